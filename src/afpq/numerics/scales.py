# SPDX-License-Identifier: MIT
"""How scales are stored: as floats, or as bytes on a logarithmic grid fitted to the weight.

A "log8" scale is a sign bit and k, 0 .. 127: +- 2^(low + step * k). `low` and `step` are two float32 of the whole
weight, chosen so that the grid spans the scales its groups have: steps of 2 to 3 % where an 8-bit float has 6 to 12.

A negative scale mirrors the code book of its group, which costs no bits: w = value * scale either way. So a book with
more values on one side, as nf4, can serve a group whose longer side is the other.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.scheme import ScaleGrid, Scheme

# scale_dtype -> (dtype on disk, smallest positive value kept)
STORAGE = {
    "float16": (torch.float16, 2.0**-24),
    "float32": (torch.float32, 2.0**-126),
    "log8": (torch.uint8, 2.0**-126),
}
LEVELS, SIGN = 128, 128  # of the grid; and the bit of a stored byte that says minus
MOST_OCTAVES = 12.0  # a grid spans; smaller scales become its smallest, 1/4096 of the largest
BELOW, ABOVE = 0.4, 1.5  # room for searches, which shrink scales, and for corrections of weights, which let them grow


def fit_grid(scheme: Scheme, scales: Tensor) -> Scheme:
    """The scheme with a grid for a weight whose absmax scales are `scales`, any float shape; others as they are."""
    if scheme.scale_dtype != "log8" or scheme.grid is not None:
        return scheme
    live = scales[scales > 0].double()
    low, high = (live.min().item() * BELOW, live.max().item() * ABOVE) if len(live) else (1.0, 1.0)
    top, bottom = (math.log2(min(max(v, STORAGE["log8"][1]), 2.0**127)) for v in (high, low))
    bottom = max(bottom, top - MOST_OCTAVES)
    step = _float32(max((top - bottom) / (LEVELS - 1), 2.0**-20))
    return replace(scheme, grid=ScaleGrid(_float32(bottom), step))


def _float32(value: float) -> float:
    result: float = struct.unpack("f", struct.pack("f", value))[0]
    return result


@lru_cache(maxsize=256)
def _magnitudes(grid: ScaleGrid, device: torch.device) -> Tensor:
    k = torch.arange(LEVELS, dtype=torch.float64, device=device)
    return torch.exp2(grid.low + grid.step * k).float()


def to_grid(scale: Tensor, grid: ScaleGrid) -> Tensor:
    """Float scales > 0 of any shape -> the nearest k (by ratio), int64, same shape."""
    k = (scale.double().log2() - grid.low) / grid.step
    return k.round_().clamp_(0, LEVELS - 1).long()


def round_to_storage(scale: Tensor, scheme: Scheme, saturate: bool = False) -> Tensor:
    """Float scales >= 0 as the scheme stores them: never zero, and 1 where the group has no weight but zero.

    In the dtype of the storage; float32 where that is a grid, which has to be there. A book without a zero cannot say
    0, so there an all-zero group takes the smallest scale instead of 1. A scale too large to store becomes the largest
    with `saturate` or on a grid, and else raises AfpqError.
    """
    dtype, smallest = STORAGE[scheme.scale_dtype]
    empty = 1.0 if scheme.format.has_zero else smallest
    if dtype == torch.uint8:
        assert scheme.grid is not None, "fit_grid comes first"
        return _magnitudes(scheme.grid, scale.device)[to_grid(torch.where(scale > 0, scale, empty), scheme.grid)]
    if saturate:
        scale = scale.clamp(max=torch.finfo(dtype).max)
    elif bool((scale > torch.finfo(dtype).max).any()):
        raise AfpqError(f"weights too large for {scheme.scale_dtype} scales (scale {scale.max():.3g})")
    return torch.where(scale > 0, scale.clamp(min=smallest), empty).to(dtype)


def to_bytes(scale: Tensor, grid: ScaleGrid) -> Tensor:
    """Scales on the grid, of either sign and any shape -> uint8, same shape."""
    return (to_grid(scale.abs(), grid) + SIGN * (scale < 0)).to(torch.uint8)


def grid_tensor(grid: ScaleGrid) -> Tensor:
    """float32 [2] (low, step), as it is saved."""
    return torch.tensor([grid.low, grid.step])


def from_bytes(saved: Tensor, grid: Tensor) -> Tensor:
    """uint8 of any shape and the saved grid, float32 [2] -> float32 scales, same shape."""
    k = torch.arange(LEVELS, dtype=torch.float64, device=grid.device)
    magnitudes = torch.exp2(grid[0].double() + grid[1].double() * k).float()
    return torch.cat([magnitudes, -magnitudes])[saved.int()]


def check_scales_finite(tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raises AfpqError naming the first of a weight's saved tensors that makes a scale NaN or Inf; no scale is."""
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.dtype.is_floating_point:
            continue
        reached = from_bytes(torch.arange(2 * LEVELS, device=tensor.device), tensor) if name == "scale_grid" else tensor
        if not bool(torch.isfinite(reached).all()):
            raise AfpqError(f"tensor {prefix}{name} holds or makes NaN or Inf; the file is damaged, get it again")
