# SPDX-License-Identifier: MIT
"""Code books learned from a weight: Lloyd-Max (Lloyd 1982, Max 1960) between the scales of its groups.

The error of a weight w, stored as value * s with its group's scale s, counts h (w - value s)^2, h being the importance
of its column. For codes kept, the best value of a code is a mean, sum h s w / sum h s^2 over all weights that have it;
for values kept, codes and the scales of least squares follow. Steps of both go down until they are searched anew
(`search.py`), and so a few times. Where scales are the group's extremes, these follow the ends of the book, and only
what lies between the ends is learned.

There are two starts: nf, whose exact 0 stays, and the quantizer of the normal distribution with as many values below
0 as above, which mostly wins at 2 bits, where a 0 is a quarter of the codes. The book of least error by the recipe's
own scales is the result. A sample of whole rows, drawn with a fixed seed, teaches it: 4 to 16 values need no more, and
every column is in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.formats import Format, custom_format
from afpq.numerics.groups import GroupScales, QuantizedWeight, encode, fit_scales, parts, with_grid
from afpq.numerics.scale_search import search_scales
from afpq.numerics.scheme import Scheme

SAMPLE = 2**16  # weights that teach a book; all of a smaller weight
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


def with_codebook(
    weight: Tensor, scheme: Scheme, scale_search: str = "mse", importance: Tensor | None = None
) -> Scheme:
    """The scheme with a book (and grid) for a weight [rows, in], any float; as it is, unless its format is learned.

    `importance`, float [in] >= 0, weighs the columns. On the sample the squared error by `scale_search` is at most that
    of nf, and nf is what stays where nothing is below it. Raises AfpqError as `fit_scales` does.
    """
    if not scheme.format.learned:
        return scheme
    start = with_grid(weight, replace(scheme, format=scheme.format.start))
    x = sample_rows(weight).float()
    h = torch.ones(x.shape[1], device=x.device) if importance is None else importance.float()
    books = (start.format, without_zero(len(start.format.values)))
    tried = [_learn(x, h, replace(start, format=book), scale_search, TRIAL) for book in books]
    better = min(tried, key=lambda found: found[1])[0]
    return _learn(x, h, better, scale_search, ROUNDS)[0]


def sample_rows(weight: Tensor) -> Tensor:
    """Some rows of a weight [rows, in], in order; all of a small one. The same for the same shape."""
    count = max(LEAST_ROWS, SAMPLE // weight.shape[1])
    if len(weight) <= count:
        return weight
    chosen = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:count]
    return weight[chosen.sort().values.to(weight.device)]


def without_zero(count: int) -> Format:
    """The start of `count` values, half of them on each side of 0."""
    above = [value / _MAX[count][-1] for value in _MAX[count]]
    return custom_format([round(sign * value, DECIMALS) for sign in (-1, 1) for value in above])


def error_of(weight: QuantizedWeight, x: Tensor, h: Tensor) -> float:
    """sum h (w - w_hat)^2 against x float32 [rows, in], h [in]."""
    return float(((weight.dequantize() - x).square() * h).double().sum())


def _fit(x: Tensor, h: Tensor, scheme: Scheme, scale_search: str) -> QuantizedWeight:
    """x by the recipe's scales."""
    scales = fit_scales(x, scheme) if scale_search == "absmax" else search_scales(x, scheme, h)
    return QuantizedWeight(encode(x, scales, scheme), scales, scheme)


def _learn(x: Tensor, h: Tensor, scheme: Scheme, scale_search: str, rounds: int) -> tuple[Scheme, float]:
    """The scheme with the best book found from its own, and the error of that."""
    weight = _fit(x, h, scheme, scale_search)
    best, least = scheme, error_of(weight, x, h)
    for _ in range(rounds):
        book = learn_values(x, h, weight, fixed_scales=scale_search == "absmax")
        if book is None or book == weight.scheme.format:
            break
        weight = _fit(x, h, replace(scheme, format=book), scale_search)
        error = error_of(weight, x, h)
        if error < least:
            best, least = weight.scheme, error
    return best, least


def learn_values(
    x: Tensor, h: Tensor, weight: QuantizedWeight, fixed_scales: bool = False, steps: int | None = None
) -> Format | None:
    """A better book for x float32 [rows, in], h [in], than that of `weight`, which is x quantized; None if none is.

    The exact 0 of a book stays; with `fixed_scales` so do its ends, and the scales.
    """
    scheme, scales = weight.scheme, weight.scales
    book, codes = scheme.format, weight.codes
    span = scheme.span(x.shape[1])
    for _ in range(STEPS if steps is None else steps):
        old, values = book.values, _means(x, h, codes, scales, book, span, fixed_scales)
        try:
            book = Format("learning", tuple(values))
        except AfpqError:
            return None
        if max(abs(a - b) for a, b in zip(old, values)) < 10**-DECIMALS / 4:
            break
        if not fixed_scales:
            scales = _least_squares(x, h, codes, scales, book, span, scheme.two_scales)
        codes = encode(x, scales, replace(scheme, format=book))
    return _as_format(book.values, scheme.two_scales)


def _means(
    x: Tensor, h: Tensor, codes: Tensor, scales: GroupScales, book: Format, span: int, keep_ends: bool
) -> list[float]:
    """The value of least error for each code: sum h s w / sum h s^2; the old one where no weight has the code."""
    count = len(book.values)
    mass, moment = torch.zeros(2, count, dtype=torch.float64, device=x.device)
    below = torch.tensor([v < 0 for v in book.values], device=x.device)
    for columns, groups, length in parts(x.shape[1], span):
        part, code = x[:, columns].unflatten(-1, (-1, length)), codes[:, columns].unflatten(-1, (-1, length)).int()
        s = torch.where(below[code], scales.neg[:, groups, None].float(), scales.pos[:, groups, None].float())
        hs = s * h[columns].view(-1, length)
        code = code.flatten()
        mass += torch.bincount(code, (hs * s).double().flatten(), count)
        moment += torch.bincount(code, (hs * part).double().flatten(), count)
    new = torch.where(mass > 0, moment / mass, 0.0).tolist()
    kept = {i for i, v in enumerate(book.values) if v == 0 or not mass[i] > 0}
    kept |= {0, count - 1} if keep_ends else set()
    return [old if i in kept else value for i, (old, value) in enumerate(zip(book.values, new))]


def _least_squares(
    x: Tensor, h: Tensor, codes: Tensor, scales: GroupScales, book: Format, span: int, two_scales: bool
) -> GroupScales:
    """Each group's scales of least error for codes and values kept, float32, of the sign they have."""
    values = torch.tensor(book.values, device=x.device)
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
        found.append((new[0], new[-1]))
    pos = torch.cat([pair[0] for pair in found], 1)
    return GroupScales(pos, torch.cat([pair[1] for pair in found], 1) if two_scales else pos)


def _as_format(values: tuple[float, ...], two_scales: bool) -> Format | None:
    """Scaled to end at -1 and 1 (of one scale: the longer side), rounded; None where two values become one."""
    below, above = -values[0], values[-1]
    if not two_scales:
        below = above = max(below, above)
    try:
        return custom_format([round(v / (below if v < 0 else above), DECIMALS) for v in values])
    except AfpqError:
        return None
