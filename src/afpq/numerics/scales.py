# SPDX-License-Identifier: MIT
"""Scales that reach each group's extremes ("absmax"), and the rounding of scales to what can be stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import extremes
from afpq.numerics.scale_storage import grid_for
from afpq.numerics.scheme import Scheme


def fit_grid(weight: Tensor, scheme: Scheme) -> FittedScheme:
    """Fit the grid of the scales to a weight [rows, in], any float, if their storage needs one.

    Raises AfpqError for NaN or Inf in the weight, and for a format that is still to be learned.
    """
    if not scheme.storage.needs_grid:
        return FittedScheme(scheme)
    parts_of_rows = weight.split(max(1, 2**22 // weight.shape[-1]))  # a float copy of a head would take gigabytes
    low, high = map(torch.cat, zip(*(extremes(part.float(), scheme) for part in parts_of_rows)))
    exact = scales_from_range(low, high, FittedScheme(replace(scheme, scale_dtype="float32")))
    used = [torch.where(side > 0, scale.float(), 0) for side, scale in ((high, exact.pos), (low, exact.neg))]
    return FittedScheme(scheme, grid_for(torch.stack(used)))


def fit_scales(weight: Tensor, scheme: FittedScheme) -> GroupScales:
    """Fit scales [rows, groups] that just reach each group's extremes (the paper's, "absmax") to float32 [rows, in].

    Raises AfpqError for NaN or Inf, and for weights beyond what the scales' storage can reach.
    """
    low, high = extremes(weight, scheme.scheme)
    return scales_from_range(low, high, scheme)


def scales_from_range(low: Tensor, high: Tensor, scheme: FittedScheme, saturate: bool = False) -> GroupScales:
    """Return scales whose values span [-low, high] of each group; low, high >= 0 [rows, groups].

    See `round_to_storage` for `saturate` and errors.
    """
    codebook = scheme.format.values
    if scheme.zero_point:
        width = codebook[-1] - codebook[0]
        pos = round_to_storage(low / width + high / width, scheme, saturate)  # the sum of both could overflow
        zero = torch.round(low / pos.float()).clamp_(0, len(codebook) - 1).to(torch.uint8)
        return GroupScales(pos, pos, zero, scheme.grid)
    if scheme.format.integer:
        pos = round_to_storage(torch.maximum(low, high) / ((codebook[-1] - codebook[0]) / 2), scheme, saturate)
        return GroupScales(pos, pos, grid=scheme.grid)
    neg, pos = low / -codebook[0], high / codebook[-1]
    if scheme.scheme.sym:
        pos = round_to_storage(torch.maximum(neg, pos), scheme, saturate)
        return GroupScales(pos, pos, grid=scheme.grid)
    # An empty side takes the other's scale: corrections may fill it later.
    return GroupScales(
        round_to_storage(torch.where(pos > 0, pos, neg), scheme, saturate),
        round_to_storage(torch.where(neg > 0, neg, pos), scheme, saturate),
        grid=scheme.grid,
    )


def round_to_storage(scale: Tensor, scheme: FittedScheme, saturate: bool = False) -> Tensor:
    """Round float scales >= 0 of any shape to what can be stored: never zero, and 1 if the group has no weight but 0.

    The result is in the storage's `memory_dtype`. A codebook without a zero has no code for 0, so there an all-zero
    group takes the smallest scale instead of 1. A scale too large to store becomes the largest with `saturate` or on a
    grid, and else raises AfpqError.
    """
    storage = scheme.storage
    empty = 1.0 if scheme.format.has_zero else storage.smallest
    if storage.needs_grid:
        return storage.round(torch.where(scale > 0, scale, empty), scheme.grid)
    largest = torch.finfo(storage.dtype).max
    if saturate:
        scale = scale.clamp(max=largest)
    elif bool((scale > largest).any()):
        raise AfpqError(f"weights too large for {storage.name} scales (scale {scale.max():.3g})")
    return storage.round(torch.where(scale > 0, scale.clamp(min=storage.smallest), empty), None)
