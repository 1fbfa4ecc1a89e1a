# SPDX-License-Identifier: MIT
"""AWQ (arXiv 2306.00978): two searches that make a weight easier to round where its inputs are large.

Channel scales: the columns of W that meet large inputs are multiplied by s > 1, and whatever produces those inputs is
divided by s (`model/awq_folds.py`). The function is the same, but the scaled columns round finer: a group's step hardly
grows while their error shrinks by s. AWQ searches s = magnitude^alpha over alpha alone, since magnitudes show which
columns matter.

Clips: a group's range is shrunk if the output gains more from finer steps than it loses by clipping, or widened a
little if that lowers the error. The two sides of a group have a scale each (AFPQ) and meet in the output, so the
best pair is searched, not each side for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import decode_groups, encode_groups, extremes, parts
from afpq.numerics.scale_search import RATIOS
from afpq.numerics.scales import scales_from_range

SMALLEST, LARGEST = 1e-4, 1e4  # of channel scales: beyond, float16 weights and norms would lose digits
CHUNK = 2**16  # weights clipped at a time: all their candidates, a few times over, are in memory


@dataclass(frozen=True)
class ChannelScales:
    """Scales of the input channels (float32 [in]), the loss without and with them, and the winner's alpha.

    alpha 0 means that nothing beat no scaling; the scales then are exactly 1 and both losses are equal.
    """

    scales: Tensor
    before: float
    after: float
    alpha: float


def search_channel_scales(
    weights: list[Tensor],
    magnitude: Tensor,
    loss: Callable[[list[Tensor]], float],
    quantize: Callable[[int, Tensor], Tensor],
    grid: int = 20,
) -> ChannelScales:
    """Search scales for the inputs that the weights, each float [out_i, in], have in common (arXiv 2306.00978, 3.2).

    `magnitude` [in] is the mean |x| of every input. `quantize(i, w)` quantizes and dequantizes weight i, float32
    [out_i, in], with its scheme. `loss(approximations)` measures the output error of the weights' float32
    approximations, applied to the unscaled inputs; NaN counts as a loss of infinity. Raises AfpqError if `quantize`
    does so without scaling; a candidate that it raises AfpqError for is skipped.
    """
    weights = [w.float() for w in weights]
    before = loss([quantize(i, w) for i, w in enumerate(weights)])
    best = ChannelScales(torch.ones(weights[0].shape[1], device=weights[0].device), before, before, 0.0)
    for step in range(1, grid + 1):
        scales = _candidate(magnitude.to(best.scales.device), step / grid)
        try:
            after = loss([quantize(i, w * scales) / scales for i, w in enumerate(weights)])
        except AfpqError:  # scaled weights beyond what the scheme's scales can store
            continue
        if after < best.after:
            best = ChannelScales(scales, before, after, step / grid)
    return best


def _candidate(magnitude: Tensor, alpha: float) -> Tensor:
    """Return magnitude^alpha, divided by the geometric mean of its extremes, so that ups and downs are in balance."""
    m = magnitude.double().abs()
    live = m[torch.isfinite(m) & (m > 0)]
    if not len(live):
        return torch.ones_like(m, dtype=torch.float32)
    # An input that is never there takes the smallest scale: scaled up, its column would only stretch the group.
    m = torch.where(torch.isnan(m), live.min(), m.clamp(live.min(), live.max()))
    s = (m / (live.max() * live.min()).sqrt()) ** alpha
    return s.float().clamp(SMALLEST, LARGEST)


def linear_loss(weights: list[Tensor], H: Tensor) -> Callable[[list[Tensor]], float]:
    """Make the loss for `search_channel_scales` that needs no forward pass: the linears' own squared output error.

    `weights` float [out_i, in] and H = X^T X [in, in] of the unscaled inputs X: sum of tr((Q-W) H (Q-W)^T).
    """

    def loss(approximations: list[Tensor]) -> float:
        errors = [q - w.float() for q, w in zip(approximations, weights)]
        return sum(((e @ H) * e).sum().item() for e in errors)

    return loss


def search_clips(W: Tensor, H: Tensor, scheme: FittedScheme, ratios: tuple[float, ...] = RATIOS) -> GroupScales:
    """Search scales [rows, groups] of least output error for W float [rows, in], H = X^T X [in, in] up to a factor.

    For each row and group, the error is e H_gg e^T with e = w - w_hat and H_gg the group's block of H. All pairs of
    a positive and a negative ratio of the absmax scales are tried; if a group has one scale, or scale and zero
    point, one ratio for both ends. absmax is always among them, so the error is never larger than its own (up to
    float32 rounding), and it stays if H is zero or NaN. The method is AWQ's clipping (arXiv 2306.00978, released
    code), there with one ratio; each row costs 2 x ratios products with H_gg. Raises AfpqError as `fit_scales` does.
    """
    W, H = W.float(), H.float()
    low, high = extremes(W, scheme.scheme)
    best = scales_from_range(low, high, scheme)  # overwritten: results kept in pieces would fragment the memory
    shrink = torch.tensor([1.0, *(r for r in ratios if r != 1.0)], device=W.device)  # absmax first: it wins ties
    for columns, groups, length in parts(W.shape[1], scheme.span(W.shape[1])):
        starts = range(columns.start, columns.stop, length)
        blocks = torch.stack([H[first : first + length, first : first + length] for first in starts])
        step = max(1, CHUNK // (columns.stop - columns.start))
        for first in range(0, len(W), step):
            rows = slice(first, first + step)
            x = W[rows, columns].unflatten(1, (-1, length)).transpose(0, 1)
            ends = [end[rows, groups].T[..., None] * shrink for end in (low, high)]
            found = _best(x, blocks, scales_from_range(ends[0], ends[1], scheme), scheme)
            best.pos[rows, groups] = found.pos.T
            if scheme.two_scales:
                best.neg[rows, groups] = found.neg.T
            if best.zero is not None and found.zero is not None:
                best.zero[rows, groups] = found.zero.T
    return best


def _best(x: Tensor, H: Tensor, candidates: GroupScales, scheme: FittedScheme) -> GroupScales:
    """Choose the best of candidates [groups, rows, count] for x [groups, rows, length], H [groups, length, length]."""
    x = x[:, :, None]
    codes = encode_groups(x, candidates[..., None], scheme.format)
    E = x - decode_groups(codes, candidates[..., None], scheme.format.values)
    if not scheme.two_scales:
        pos = neg = _lowest((_times(E, H) * E).sum(-1))
    else:
        # A weight's error depends on its own side's scale only: E splits into two sides, (P + N) H (P + N)^T.
        P = E * (x >= 0)
        N = E.sub_(P)
        HP = _times(P, H)
        own = (HP * P).sum(-1)[..., :, None] + (_times(N, H) * N).sum(-1)[..., None, :]
        pair = _lowest(own.add_(HP @ N.mT, alpha=2).flatten(2))
        pos, neg = pair // E.shape[2], pair % E.shape[2]
    best_pos = _pick(candidates.pos, pos)
    best_neg = _pick(candidates.neg, neg) if scheme.two_scales else best_pos
    zero = None if candidates.zero is None else _pick(candidates.zero, pos)
    return replace(candidates, pos=best_pos, neg=best_neg, zero=zero)


def _times(E: Tensor, H: Tensor) -> Tensor:
    """Multiply E [groups, rows, candidates, length] by its group's H."""
    return (E.flatten(1, 2) @ H).view(E.shape)


def _lowest(error: Tensor) -> Tensor:
    """Return the index of the smallest error along the last dimension, the first of equals; NaN never wins."""
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(-1)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(-1, index[..., None]).squeeze(-1)
