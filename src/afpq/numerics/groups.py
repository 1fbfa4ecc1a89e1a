# SPDX-License-Identifier: MIT
"""All rounding of weights in the library: weights and scales -> codes, codes and scales -> weights.

For a group w with codebook c (arXiv 2311.01792, algorithm 1):

    s_pos = max(w, 0) / c_max        s_neg = -min(w, 0) / |c_min|
    code  = nearest value to w / s_pos if w >= 0, to w / s_neg if w < 0; a tie takes the lower value
            (integers: the even code, as the authors' torch.round does)
    back  = value * (s_pos if value >= 0 else s_neg)

Symmetric: both scales are the larger one. Integers divide by half the codebook's range when symmetric, and have a scale
and a zero point when asymmetric: back = s * (value[code] - value[zero]). `scales.py` fits the scales.

What the authors' code lacks: a side without weights takes the other side's scale; an all-zero group has scale 1;
stored scales never underflow to zero; a row's last group may be short; NaN, Inf and overflow are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.formats import Format
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.scheme import Scheme

FEW = 1024  # numbers that are compared with all midpoints at once, since calls take longer than their work


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] as codes and scales.

    - `codes`: uint8 [out, in], each < 2^bits, `bits` being those of the scheme's format; a code without a value, which
      only a damaged file contains, stands for 0
    - `scales`: `pos` and `neg` [out, groups] in the `memory_dtype` of the scheme's storage, finite and not zero; one
      tensor unless the scheme has two scales
    - `scales.zero`: uint8 [out, groups], codes of the format, exactly if the scheme has zero points
    - `scales.grid`: exactly if the scheme's storage needs one
    - `scheme`: its format is not `learned`
    - reconstruction, with v the format's values, g the group of a column, s the scales and z the zero points:
      w[o, i] = v[codes[o, i]] * (s.pos[o, g] if v[codes[o, i]] >= 0 else s.neg[o, g]), or with zero points
      w[o, i] = (v[codes[o, i]] - v[z[o, g]]) * s.pos[o, g]; products are taken in float32

    Nothing is checked until `validate` is called.
    """

    codes: Tensor
    scales: GroupScales
    scheme: Scheme

    @property
    def fitted(self) -> FittedScheme:
        """The scheme together with the grid of these scales. Raises AfpqError if they do not fit each other."""
        return FittedScheme(self.scheme, self.scales.grid)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix, [out, in] in `dtype`; the product of value and scale is taken in float32."""
        values = self.scheme.format.values
        return decode(self.codes, self.scales, values, self.scheme.span(self.codes.shape[-1])).to(dtype)

    def validate(self) -> None:
        """Check the conditions above. Raises AfpqError naming the first that does not hold. Reads all codes once."""
        fitted, scales, format = self.fitted, self.scales, self.scheme.format
        _check("codes", self.codes, torch.uint8, None)
        if self.codes.numel() and int(self.codes.max()) >= 2**format.bits:
            raise AfpqError(f"codes: {int(self.codes.max())} does not fit {format.bits} bits")
        shape = (len(self.codes), fitted.groups(self.codes.shape[1]))
        for name, side in (("scales.pos", scales.pos), ("scales.neg", scales.neg)):
            _check(name, side, fitted.storage.memory_dtype, shape)
            if not bool((torch.isfinite(side.float()) & (side.float() != 0)).all()):
                raise AfpqError(f"{name}: contains zero, NaN or Inf")
        if not fitted.two_scales and scales.neg is not scales.pos:
            raise AfpqError(f"scales.neg: {self.scheme} has one scale for both signs")
        if fitted.zero_point != (scales.zero is not None):
            raise AfpqError(f"scales.zero: {self.scheme} has {'' if fitted.zero_point else 'no '}zero points")
        if scales.zero is not None:
            _check("scales.zero", scales.zero, torch.uint8, shape)
            if scales.zero.numel() and int(scales.zero.max()) >= len(format.values):
                raise AfpqError(f"scales.zero: {int(scales.zero.max())} is no code of {format}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int] | None) -> None:
    """Raise AfpqError unless the tensor has this dtype and shape; None is any matrix."""
    fits = tensor.dim() == 2 if shape is None else tensor.shape == shape
    if tensor.dtype != dtype or not fits:
        expected = "[out, in]" if shape is None else list(shape)
        raise AfpqError(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {expected} {dtype}")


def parts(in_features: int, span: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield (columns, groups, group length) of a row's full groups, then of its shorter last group if it has one."""
    full = in_features // span
    if full:
        yield slice(0, full * span), slice(0, full), span
    if full * span < in_features:
        yield slice(full * span, in_features), slice(full, full + 1), in_features - full * span


def extremes(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return (-min(w, 0), max(w, 0)) of every group, both >= 0, [rows, groups]. Raises AfpqError for NaN or Inf."""
    lows, highs = [], []
    for columns, _, length in parts(weight.shape[-1], scheme.span(weight.shape[-1])):
        groups = weight[:, columns].unflatten(-1, (-1, length))
        lows.append(groups.amin(-1).neg_().clamp_(min=0))
        highs.append(groups.amax(-1).clamp_(min=0))
    low, high = torch.cat(lows, -1), torch.cat(highs, -1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):  # amin and amax pass NaN on
        raise AfpqError("contains NaN or Inf; repair or skip it")
    return low, high


def encode(weight: Tensor, scales: GroupScales, scheme: Scheme) -> Tensor:
    """Round float32 [rows, in] by scales [rows, groups] to codes, uint8 [rows, in]."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for columns, groups, length in parts(weight.shape[-1], scheme.span(weight.shape[-1])):
        part = weight[:, columns].unflatten(-1, (-1, length))
        codes[:, columns] = encode_groups(part, scales[..., groups, None], scheme.format).flatten(-2)
    return codes


def encode_groups(x: Tensor, scales: GroupScales, format: Format) -> Tensor:
    """Return the codes (uint8) of x; scales broadcast against it."""
    if format.integer:
        zero = -format.values[0] if scales.zero is None else scales.zero.float()
        return (x / scales.pos.float()).round_().add_(zero).clamp_(0, len(format.values) - 1).to(torch.uint8)
    units = _in_units(x, scales)
    codes = _count_below(units, side_midpoints(format))
    if not format.has_zero:
        codes += units >= 0
    return codes


def nearest_groups(x: Tensor, scales: GroupScales, format: Format) -> tuple[Tensor, Tensor]:
    """Return (codes, their weights), equal to those of encode_groups and decode_groups, in as few calls as possible.

    For solvers that go column by column: x [rows], scales [rows] in float32. Codes are of any integer type.
    """
    if format.integer or x.numel() > FEW:
        codes = encode_groups(x, scales, format)
        return codes, decode_groups(codes, scales, format.values)
    units = _in_units(x, scales)
    codes = (units[:, None] > _tensor_of(side_midpoints(format), x.device)).sum(1)
    if not format.has_zero:
        codes += units >= 0
    return codes, _scaled(_codebook(format.values, x.device).index_select(0, codes), scales)


def _in_units(x: Tensor, scales: GroupScales) -> Tensor:
    """Divide x by the scale of its side."""
    units = x / scales.pos.float()
    return units if scales.neg is scales.pos else torch.where(units < 0, x / scales.neg.float(), units)


@lru_cache(maxsize=256)
def side_midpoints(format: Format) -> tuple[float, ...]:
    """Return the midpoints between neighbouring values <= 0, then between neighbouring values >= 0.

    A weight keeps to its side, since the side decides the scale: if the codebook has no zero, the two middle values
    are divided at 0 instead of at their midpoint, which therefore is not one of these.
    """
    return tuple((a + b) / 2 for a, b in pairwise(format.values) if b <= 0 or a >= 0)


def _count_below(x: Tensor, midpoints: tuple[float, ...]) -> Tensor:
    """Count the midpoints below x, uint8; a tie counts as not below, which rounds to the lower value.

    Comparing one by one beats a binary search for short codebooks, and needs no table of distances.
    """
    if len(midpoints) > 32:
        return torch.bucketize(x, _tensor_of(midpoints, x.device)).to(torch.uint8)
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for midpoint in midpoints:
        count += (x > midpoint).view(torch.uint8)  # the view spares a conversion
    return count


def decode(codes: Tensor, scales: GroupScales, values: tuple[float, ...] | list[float], span: int) -> Tensor:
    """Return the weights of codes uint8 [rows, in] and scales [rows, groups], float32; groups of `span` columns."""
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for columns, groups, length in parts(codes.shape[-1], span):
        part = codes[:, columns].unflatten(-1, (-1, length))
        weight[:, columns] = decode_groups(part, scales[..., groups, None], tuple(values)).flatten(-2)
    return weight


def decode_groups(codes: Tensor, scales: GroupScales, values: tuple[float, ...]) -> Tensor:
    """Return the float32 weights of codes; scales broadcast against them."""
    codebook = _codebook(values, codes.device)
    value = codebook.index_select(0, codes.int().flatten()).view(codes.shape)
    if scales.zero is not None:
        value = value - codebook[scales.zero.int()]
    return _scaled(value, scales)


def _scaled(value: Tensor, scales: GroupScales) -> Tensor:
    if scales.neg is scales.pos:
        return value * scales.pos.float()
    return value * torch.where(value < 0, scales.neg.float(), scales.pos.float())


@lru_cache(maxsize=256)
def _tensor_of(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _codebook(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the values by code; a code behind the last, of damaged files only, stands for 0 in every kernel."""
    return torch.tensor([*values, *[0.0] * (256 - len(values))], dtype=torch.float32, device=device)


def relative_error(weight: Tensor, solved: QuantizedWeight) -> float:
    """Return sum (w - w_hat)^2 / sum w^2; 0 for a weight of zeros."""
    return relative_squared_error(weight, solved.dequantize())


def relative_squared_error(weight: Tensor, approximation: Tensor) -> float:
    """Return the same for any approximation of a weight."""
    total = weight.float().square().sum().item()
    return (approximation - weight).square().sum().item() / total if total else 0.0
