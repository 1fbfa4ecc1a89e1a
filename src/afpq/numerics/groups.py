# SPDX-License-Identifier: MIT
"""All rounding in the library: weights -> scales, codes -> weights.

For a group w with code book c (arXiv 2311.01792, algorithm 1):

    s_pos = max(w, 0) / c_max        s_neg = -min(w, 0) / |c_min|
    code  = nearest value to w / s_pos where w >= 0, to w / s_neg where w < 0; a tie takes the lower value
            (integers: the even code, as the authors' torch.round does)
    back  = value * (s_pos if value >= 0 else s_neg)

Symmetric: both scales are the larger one. Integers divide by half the book's range when symmetric, and have a scale
and a zero point when asymmetric: back = s * (value[code] - value[zero]).

What the authors' code lacks: a side without weights borrows the other side's scale; an all-zero group has scale 1;
stored scales never underflow to zero; a row's last group may be short; NaN, Inf and overflow are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.formats import Format
from afpq.numerics.scales import fit_grid, round_to_storage
from afpq.numerics.scheme import Scheme

FEW = 1024  # numbers that are compared with all midpoints at once, since calls take longer than their work


@dataclass(frozen=True)
class GroupScales:
    """Scales of groups, all of one shape [..., groups], in the dtype they are stored in, or float32 on a grid.

    Both are negative where the group's code book is mirrored. `neg` is `pos` itself unless the scheme has two scales;
    `zero` (uint8 codes) exists for zero-point schemes only.
    """

    pos: Tensor
    neg: Tensor
    zero: Tensor | None = None

    def float(self) -> GroupScales:
        pos = self.pos.float()
        return GroupScales(pos, pos if self.neg is self.pos else self.neg.float(), self.zero)

    def __getitem__(self, index: object) -> GroupScales:
        pos = self.pos[index]  # type: ignore[index]
        neg = pos if self.neg is self.pos else self.neg[index]  # type: ignore[index]
        return GroupScales(pos, neg, None if self.zero is None else self.zero[index])  # type: ignore[index]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes (uint8 [out, in]) and scales ([out, groups]); `dequantize` gives the matrix back."""

    codes: Tensor
    scales: GroupScales
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] in `dtype`; the product of value and scale is taken in float32."""
        values = self.scheme.format.values
        return decode(self.codes, self.scales, values, self.scheme.span(self.codes.shape[-1])).to(dtype)


def parts(in_features: int, span: int) -> Iterator[tuple[slice, slice, int]]:
    """(columns, groups, group length) of the full groups of a row, then of its shorter last group if it has one."""
    full = in_features // span
    if full:
        yield slice(0, full * span), slice(0, full), span
    if full * span < in_features:
        yield slice(full * span, in_features), slice(full, full + 1), in_features - full * span


def fit_scales(weight: Tensor, scheme: Scheme) -> GroupScales:
    """float32 [rows, in] -> scales [rows, groups] that just reach each group's extremes (the paper's, "absmax").

    A scheme with a grid needs it fitted (`with_grid`). Raises AfpqError for NaN or Inf, and for weights beyond what
    the scales' storage can reach.
    """
    low, high = extremes(weight, scheme)
    return scales_from_range(low, high, scheme)


def with_grid(weight: Tensor, scheme: Scheme) -> Scheme:
    """The scheme, its grid fitted to a weight [rows, in] if it stores scales on one. Raises as `fit_scales`."""
    if scheme.scale_dtype != "log8" or scheme.grid is not None:
        return scheme
    parts_of_rows = weight.split(max(1, 2**22 // weight.shape[-1]))  # a float copy of a head would take gigabytes
    low, high = map(torch.cat, zip(*(extremes(part.float(), scheme) for part in parts_of_rows)))
    wide = scales_from_range(low, high, replace(scheme, scale_dtype="float32"))
    seen = [torch.where(side > 0, scale.float(), 0) for side, scale in ((high, wide.pos), (low, wide.neg))]
    return fit_grid(scheme, torch.stack(seen))


def extremes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(-min(w, 0), max(w, 0)) of every group, both >= 0, [rows, groups]. Raises AfpqError for NaN or Inf."""
    lows, highs = [], []
    for columns, _, length in parts(weight.shape[-1], scheme.span(weight.shape[-1])):
        groups = weight[:, columns].unflatten(-1, (-1, length))
        lows.append(groups.amin(-1).neg_().clamp_(min=0))
        highs.append(groups.amax(-1).clamp_(min=0))
    low, high = torch.cat(lows, -1), torch.cat(highs, -1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):  # amin and amax pass NaN on
        raise AfpqError("contains NaN or Inf; repair or skip it")
    return low, high


def scales_from_range(low: Tensor, high: Tensor, scheme: Scheme, saturate: bool = False) -> GroupScales:
    """Scales whose grid spans [-low, high] of each group; low, high >= 0. See `round_to_storage` for `saturate`."""
    book = scheme.format.values
    if scheme.zero_point:
        width = book[-1] - book[0]
        pos = round_to_storage(low / width + high / width, scheme, saturate)  # the sum of both could overflow
        zero = torch.round(low / pos.float()).clamp_(0, len(book) - 1).to(torch.uint8)
        return GroupScales(pos, pos, zero)
    if scheme.format.integer:
        pos = round_to_storage(torch.maximum(low, high) / ((book[-1] - book[0]) / 2), scheme, saturate)
        return GroupScales(pos, pos)
    neg, pos = low / -book[0], high / book[-1]
    if scheme.sym:
        pos = round_to_storage(torch.maximum(neg, pos), scheme, saturate)
        return GroupScales(pos, pos)
    return GroupScales(
        round_to_storage(
            torch.where(pos > 0, pos, neg), scheme, saturate
        ),  # an empty side borrows: corrections may fill it later
        round_to_storage(torch.where(neg > 0, neg, pos), scheme, saturate),
    )


def encode(weight: Tensor, scales: GroupScales, scheme: Scheme) -> Tensor:
    """float32 [rows, in] + scales [rows, groups] -> codes, uint8 [rows, in]."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for columns, groups, length in parts(weight.shape[-1], scheme.span(weight.shape[-1])):
        part = weight[:, columns].unflatten(-1, (-1, length))
        codes[:, columns] = encode_groups(part, scales[..., groups, None], scheme.format).flatten(-2)
    return codes


def encode_groups(x: Tensor, scales: GroupScales, format: Format) -> Tensor:
    """Codes (uint8) of x; scales broadcast against it."""
    if format.integer:
        zero = -format.values[0] if scales.zero is None else scales.zero.float()
        return (x / scales.pos.float()).round_().add_(zero).clamp_(0, len(format.values) - 1).to(torch.uint8)
    units = _in_units(x, scales)
    codes = _count_below(units, side_midpoints(format))
    if not format.has_zero:
        codes += units >= 0
    return codes


def nearest_groups(x: Tensor, scales: GroupScales, format: Format) -> tuple[Tensor, Tensor]:
    """(codes, what they say), as encode_groups and decode_groups give them, in as few calls as can be.

    For solvers that go column by column: x [rows], scales [rows] in float32. Codes are of any integer type.
    """
    if format.integer or x.numel() > FEW:
        codes = encode_groups(x, scales, format)
        return codes, decode_groups(codes, scales, format.values)
    units = _in_units(x, scales)
    codes = (units[:, None] > _tensor_of(side_midpoints(format), x.device)).sum(1)
    if not format.has_zero:
        codes += units >= 0
    return codes, _scaled(_book(format.values, x.device).index_select(0, codes), scales)


def _in_units(x: Tensor, scales: GroupScales) -> Tensor:
    """x by the scale of its side."""
    units = x / scales.pos.float()
    return units if scales.neg is scales.pos else torch.where(units < 0, x / scales.neg.float(), units)


@lru_cache(maxsize=256)
def side_midpoints(format: Format) -> tuple[float, ...]:
    """Midpoints between neighbouring values <= 0, then between neighbouring values >= 0.

    A weight keeps to its side, since the side decides the scale: where the book has no zero, the two middle values
    part at 0 instead of at their midpoint, which therefore is not one of these.
    """
    return tuple((a + b) / 2 for a, b in pairwise(format.values) if b <= 0 or a >= 0)


def _count_below(x: Tensor, midpoints: tuple[float, ...]) -> Tensor:
    """How many of the midpoints lie below x, uint8; a tie counts as not below, which rounds to the lower value.

    Comparing one by one beats a binary search for short books, and needs no table of distances.
    """
    if len(midpoints) > 32:
        return torch.bucketize(x, _tensor_of(midpoints, x.device)).to(torch.uint8)
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for midpoint in midpoints:
        count += (x > midpoint).view(torch.uint8)  # the view spares a conversion
    return count


def decode(codes: Tensor, scales: GroupScales, values: tuple[float, ...] | list[float], span: int) -> Tensor:
    """codes uint8 [rows, in] + scales [rows, groups] -> float32 [rows, in]; groups of `span` columns."""
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for columns, groups, length in parts(codes.shape[-1], span):
        part = codes[:, columns].unflatten(-1, (-1, length))
        weight[:, columns] = decode_groups(part, scales[..., groups, None], tuple(values)).flatten(-2)
    return weight


def decode_groups(codes: Tensor, scales: GroupScales, values: tuple[float, ...]) -> Tensor:
    """float32 weights of codes; scales broadcast against them."""
    book = _book(values, codes.device)
    value = book.index_select(0, codes.int().flatten()).view(codes.shape)
    if scales.zero is not None:
        value = value - book[scales.zero.int()]
    return _scaled(value, scales)


def _scaled(value: Tensor, scales: GroupScales) -> Tensor:
    if scales.neg is scales.pos:
        return value * scales.pos.float()
    return value * torch.where(value < 0, scales.neg.float(), scales.pos.float())


@lru_cache(maxsize=256)
def _tensor_of(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _book(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values by code; a code behind the last, which only a damaged file has, stands for 0 in every kernel."""
    return torch.tensor([*values, *[0.0] * (256 - len(values))], dtype=torch.float32, device=device)


def relative_error(weight: Tensor, solved: QuantizedWeight) -> float:
    """sum (w - w_hat)^2 / sum w^2; 0 for a weight of zeros."""
    return relative_squared_error(weight, solved.dequantize())


def relative_squared_error(weight: Tensor, approximation: Tensor) -> float:
    """Return the same for any approximation of a weight."""
    total = weight.float().square().sum().item()
    return (approximation - weight).square().sum().item() / total if total else 0.0
