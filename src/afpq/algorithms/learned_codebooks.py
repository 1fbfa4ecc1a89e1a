# SPDX-License-Identifier: MIT
"""Codebooks learned from a weight: Lloyd-Max (Lloyd 1982, Max 1960) between the scales of its groups.

The error of a weight w, stored as value * s with its group's scale s, counts h (w - value s)^2, h being the importance
of its column. For codes kept, the best value of a code is a mean, sum h s w / sum h s^2 over all weights that have it;
for values kept, codes and the scales of least squares follow. Steps of both alternate until the scales are searched
anew (`scale_search.py`), and so a few times. If scales are the group's extremes, these follow the ends of the codebook,
and only the values between the ends are learned.

There are two starts: nf, whose exact 0 stays, and the quantizer of the normal distribution with as many values below
0 as above, which mostly wins at 2 bits, where a 0 is a quarter of the codes. The codebook of least error by the
recipe's own scales is the result. It is fitted to a sample of whole rows, drawn with a fixed seed: 4 to 16 values need
no more, and every column is in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.formats import Format, custom_format
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, encode, parts
from afpq.numerics.scale_search import find_scales

SAMPLE = 2**16  # weights that a codebook is fitted to; all of a smaller weight
LEAST_ROWS = 16
TRIAL, ROUNDS = 2, 10  # rounds of searched scales: from either start, and from there on of the better one
STEPS = 20  # of values, codes and scales in a round, at most
DECIMALS = 3  # of the values: far finer than their distances

# Max 1960, table I: of least squared error for the normal distribution; the values above 0.
_MAX = {
    4: (0.4528, 1.510),
    8: (0.2451, 0.7560, 1.344, 2.152),
    16: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


def learn_codebook(
    weight: Tensor, start: FittedScheme, scale_search: str = "mse", importance: Tensor | None = None
) -> FittedScheme:
    """Learn a codebook for a weight [rows, in], any float; the rest of `start`, a scheme of nf, stays.

    `importance`, float [in] >= 0, weighs the columns. On the sample the squared error by `scale_search` is at most that
    of nf, and nf is the result if nothing is below it. Raises AfpqError as `find_scales` does.
    """
    x = sample_rows(weight).float()
    h = torch.ones(x.shape[1], device=x.device) if importance is None else importance.float()
    starts = (start.format, without_zero(len(start.format.values)))
    tried = [_learn(x, h, start.with_format(codebook), scale_search, TRIAL) for codebook in starts]
    better = min(tried, key=lambda found: found[1])[0]
    return _learn(x, h, better, scale_search, ROUNDS)[0]


def sample_rows(weight: Tensor) -> Tensor:
    """Choose some rows of a weight [rows, in], in order; all of a small one. The same for the same shape."""
    count = max(LEAST_ROWS, SAMPLE // weight.shape[1])
    if len(weight) <= count:
        return weight
    chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:count]
    return weight[chosen.sort().values.to(weight.device)]


def without_zero(count: int) -> Format:
    """Return the start of `count` values, half of them on each side of 0."""
    above = [value / _MAX[count][-1] for value in _MAX[count]]
    return custom_format([round(sign * value, DECIMALS) for sign in (-1, 1) for value in above])


def error_of(weight: QuantizedWeight, x: Tensor, h: Tensor) -> float:
    """Return sum h (w - w_hat)^2 against x float32 [rows, in], h [in]."""
    return float(((weight.dequantize() - x).square() * h).double().sum())


def _round(x: Tensor, h: Tensor, scheme: FittedScheme, scale_search: str) -> QuantizedWeight:
    """Round x to nearest by the recipe's scales."""
    scales = find_scales(x, scheme, scale_search, h)
    return QuantizedWeight(encode(x, scales, scheme.scheme), scales, scheme.scheme)


def _learn(x: Tensor, h: Tensor, scheme: FittedScheme, scale_search: str, rounds: int) -> tuple[FittedScheme, float]:
    """Return the scheme with the best codebook found from its own, and the error of that."""
    weight = _round(x, h, scheme, scale_search)
    best, least = scheme, error_of(weight, x, h)
    for _ in range(rounds):
        codebook = learn_values(x, h, weight, fixed_scales=scale_search == "absmax")
        if codebook is None or codebook == weight.scheme.format:
            break
        scheme = scheme.with_format(codebook)
        weight = _round(x, h, scheme, scale_search)
        error = error_of(weight, x, h)
        if error < least:
            best, least = scheme, error
    return best, least


def learn_values(
    x: Tensor, h: Tensor, weight: QuantizedWeight, fixed_scales: bool = False, steps: int | None = None
) -> Format | None:
    """Find a better codebook for x float32 [rows, in], h [in], than that of `weight`, which is x quantized.

    The exact 0 of a codebook stays; with `fixed_scales` so do its ends, and the scales. None if two values become one.
    """
    scheme, scales = weight.scheme, weight.scales
    codebook, codes = scheme.format, weight.codes
    span = scheme.span(x.shape[1])
    for _ in range(STEPS if steps is None else steps):
        old, values = codebook.values, _means(x, h, codes, scales, codebook, span, fixed_scales)
        try:
            codebook = Format("learning", tuple(values))
        except AfpqError:
            return None
        if max(abs(a - b) for a, b in zip(old, values)) < 10**-DECIMALS / 4:
            break
        if not fixed_scales:
            scales = _least_squares(x, h, codes, scales, codebook, span, scheme.two_scales)
        codes = encode(x, scales, replace(scheme, format=codebook))
    return _as_format(codebook.values, scheme.two_scales)


def _means(
    x: Tensor, h: Tensor, codes: Tensor, scales: GroupScales, codebook: Format, span: int, keep_ends: bool
) -> list[float]:
    """Return the value of least error for each code, sum h s w / sum h s^2; the old one if no weight has the code."""
    count = len(codebook.values)
    mass, moment = torch.zeros(2, count, dtype=torch.float64, device=x.device)
    below = torch.tensor([v < 0 for v in codebook.values], device=x.device)
    for columns, groups, length in parts(x.shape[1], span):
        part, code = x[:, columns].unflatten(-1, (-1, length)), codes[:, columns].unflatten(-1, (-1, length)).int()
        s = torch.where(below[code], scales.neg[:, groups, None].float(), scales.pos[:, groups, None].float())
        hs = s * h[columns].view(-1, length)
        code = code.flatten()
        mass += torch.bincount(code, (hs * s).double().flatten(), count)
        moment += torch.bincount(code, (hs * part).double().flatten(), count)
    new = torch.where(mass > 0, moment / mass, 0.0).tolist()
    kept = {i for i, v in enumerate(codebook.values) if v == 0 or not mass[i] > 0}
    kept |= {0, count - 1} if keep_ends else set()
    return [old if i in kept else value for i, (old, value) in enumerate(zip(codebook.values, new))]


def _least_squares(
    x: Tensor, h: Tensor, codes: Tensor, scales: GroupScales, codebook: Format, span: int, two_scales: bool
) -> GroupScales:
    """Return each group's scales of least error for codes and values kept, float32, of the sign they have."""
    values = torch.tensor(codebook.values, device=x.device)
    found = []
    for columns, groups, length in parts(x.shape[1], span):
        part, u = x[:, columns].unflatten(-1, (-1, length)), values[codes[:, columns].int()].unflatten(-1, (-1, length))
        hu = u * h[columns].view(-1, length)
        old = scales[:, groups]
        sides = (u.clamp(min=0), u.clamp(max=0)) if two_scales else (u,)
        new = []
        for side, before in zip(sides, (old.pos, old.neg)):
            above, below = (hu * part * (side != 0)).sum(-1), (hu * side).sum(-1)
            scale = above / below
            good = torch.isfinite(scale) & (scale * before.sign() > 0)
            new.append(torch.where(good, scale, before.float()))
        found.append(GroupScales(new[0], new[-1]))
    return GroupScales.cat(found, 1)


def _as_format(values: tuple[float, ...], two_scales: bool) -> Format | None:
    """Scale to end at -1 and 1 (with one scale: the longer side), and round; None if two values become one."""
    below, above = -values[0], values[-1]
    if not two_scales:
        below = above = max(below, above)
    try:
        return custom_format([round(v / (below if v < 0 else above), DECIMALS) for v in values])
    except AfpqError:
        return None
