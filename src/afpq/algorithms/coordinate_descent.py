# SPDX-License-Identifier: MIT
"""Block coordinate descent on a layer's loss, over codes and scales: never makes it worse.

The loss of a quantized weight Q against W is tr((Q-W) H (Q-W)^T), row by row. With G = (Q-W) H given, the best value
of one weight, all others kept, is q_j - G_j / H_jj, rounded; the best change of a group's two scales solves a 2 x 2
system a row. One sweep visits every group: its scales, then each of its columns; changes reach G's other columns in one
product a group, so that a sweep costs one product of H with the weight's size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, decode_groups, nearest_groups
from afpq.numerics.scales import round_to_storage


def descend(W: Tensor, H: Tensor, weight: QuantizedWeight, sweeps: int) -> QuantizedWeight:
    """Improve `weight` as a stand-in for W; the result's loss is at most the given one's, up to rounding.

    W is float32 [out, in], H float32 [in, in] positive definite. Raises AfpqError if the weight's scales and scheme do
    not fit each other.
    """
    scheme = weight.fitted
    span = scheme.span(W.shape[1])
    codes, scales = weight.codes.T.contiguous(), weight.scales.map(Tensor.clone)
    Gt = H @ (weight.dequantize() - W).T  # H is symmetric; transposed, so that a column of G is contiguous
    importance = H.diagonal().tolist()
    groups = [range(first, min(first + span, W.shape[1])) for first in range(0, W.shape[1], span)]
    members = [sorted(group, key=lambda column: -importance[column]) for group in groups]
    for _ in range(sweeps):
        for group, columns in enumerate(members):
            new = _descend_group(codes, Gt, H, columns, scales[:, group], scheme)
            scales.pos[:, group] = new.pos
            if scheme.two_scales:
                scales.neg[:, group] = new.neg
    return QuantizedWeight(codes.T.contiguous(), scales, weight.scheme)


def _descend_group(
    codes: Tensor, Gt: Tensor, H: Tensor, columns: list[int], scales: GroupScales, scheme: FittedScheme
) -> GroupScales:
    """Improve the codes [in, out] of some columns and their scales [out], in place; Gt follows."""
    values = scheme.format.values
    first, end = min(columns), max(columns) + 1
    Hb = H[first:end, first:end]
    before = decode_groups(codes[first:end], scales, values)
    scales = _refit(codes[first:end], Gt[first:end], Hb, scales, scheme)
    Q = decode_groups(codes[first:end], scales, values)
    G = Gt[first:end] + Hb @ (Q - before)
    steps = Hb.diagonal().reciprocal().tolist()
    rows = list(zip(Q, G, Hb.T, codes[first:end], steps))  # views, made once: indexing costs as much as the arithmetic
    exact = scales.float()
    for column in columns:
        q, g, h, code, step = rows[column - first]
        found, value = nearest_groups(torch.sub(q, g, alpha=step), exact, scheme.format)
        code.copy_(found)
        G.addr_(h, value - q)
        q.copy_(value)
    Gt.addmm_(H[:, first:end], Q - before)
    return scales


def _refit(codes: Tensor, G: Tensor, Hb: Tensor, scales: GroupScales, scheme: FittedScheme) -> GroupScales:
    """Return the scales of least loss for codes [n, out], as stored; a row keeps its old ones if those are better."""
    one = torch.ones_like(scales.pos, dtype=torch.float32)
    units = decode_groups(codes, GroupScales(one, one, scales.zero), scheme.format.values)
    sides = [units.clamp(min=0), units.clamp(max=0)] if scheme.two_scales else [units]
    HU = [Hb @ u for u in sides]
    gradient = [(u * G).sum(0) for u in sides]
    step = _newton_step([[(u * hu).sum(0) for hu in HU] for u in sides], gradient)
    old = [scales.pos, scales.neg][: len(sides)]
    new = [_moved(s.float(), d, scheme) for s, d in zip(old, step)]
    changed = sum((n.float() - s.float()) * u for n, s, u in zip(new, old, sides))
    assert isinstance(changed, Tensor)
    better = (changed * (2 * G + Hb @ changed)).sum(0) < 0
    picked = [torch.where(better, n, s) for n, s in zip(new, old)]
    return replace(scales, pos=picked[0], neg=picked[-1])


def _moved(scale: Tensor, step: Tensor, scheme: FittedScheme) -> Tensor:
    """Return scale + step, of the sign of the scale and within four times its size, as stored."""
    sign, size = torch.where(scale < 0, -1.0, 1.0), scale.abs()
    new = round_to_storage((size + sign * step).clamp(min=0.25 * size, max=4 * size), scheme, saturate=True)
    return new * sign.to(new.dtype)


def _newton_step(A: list[list[Tensor]], gradient: list[Tensor]) -> list[Tensor]:
    """Return -A^-1 gradient for each row, A being 1 x 1 or 2 x 2; zero for a row whose A is singular."""
    if len(A) == 1:
        return [torch.where(A[0][0] > 0, -gradient[0] / A[0][0], 0.0)]
    (a, b), (_, d) = A
    ridge = 1e-6 * (a + d)
    a, d = a + ridge, d + ridge
    determinant = a * d - b * b
    safe = determinant > 0
    return [
        torch.where(safe, (b * gradient[1] - d * gradient[0]) / determinant, 0.0),
        torch.where(safe, (b * gradient[0] - a * gradient[1]) / determinant, 0.0),
    ]
