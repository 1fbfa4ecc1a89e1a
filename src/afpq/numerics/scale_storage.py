# SPDX-License-Identifier: MIT
"""How one scale is stored: a table of storages, as floats or as bytes on a logarithmic grid fitted to the weight.

A "log8" scale is a sign bit and k, 0 .. 127: +- 2^(low + step * k). `low` and `step` are two float32 of the whole
weight, chosen so that the grid spans the scales its groups have: steps of 2 to 3 % where an 8-bit float has 6 to 12.

To add a storage, add a row to `SCALE_STORAGES`; scheme texts, searches, packing and the reference kernel follow it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar

from afpq.errors import AfpqError

if TYPE_CHECKING:  # a scheme is a value that the command line checks before it needs torch
    import torch
    from torch import Tensor

LEVELS, SIGN = 128, 128  # of the grid; and the bit of a stored byte that is set for a negative scale
MOST_OCTAVES = 12.0  # a grid spans; smaller scales become its smallest, 1/4096 of the largest
BELOW, ABOVE = 0.4, 1.5  # room for searches, which shrink scales, and for corrections of weights, which let them grow
SMALLEST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True)
class ScaleGrid:
    """The 128 magnitudes that a scale of one weight can have: 2^(low + step * k), k = 0 .. 127."""

    low: float
    step: float


@dataclass(frozen=True)
class ScaleStorage:
    """One way to store scales.

    `dtype` is that on disk, which no other storage shares, `memory_dtype` that of `GroupScales`; the fields hold their
    names in torch. `smallest` is the smallest positive scale kept. All functions keep the shape:

    - `round(scales, grid)`: positive float scales -> the nearest scales that can be stored, in `memory_dtype`
    - `encode(scales, grid)`: scales of either sign in `memory_dtype` -> as they lie on disk, in `dtype`
    - `decode(stored, grid)`: the inverse of `encode`; `grid` is the saved one, float32 [2] (low, step)

    `grid` is None exactly if `needs_grid` is False.
    """

    name: str
    dtype_name: str
    memory_dtype_name: str
    smallest: float
    needs_grid: bool
    round: Callable[[Tensor, ScaleGrid | None], Tensor]
    encode: Callable[[Tensor, ScaleGrid | None], Tensor]
    decode: Callable[[Tensor, Tensor | None], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return _dtype(self.dtype_name)

    @property
    def memory_dtype(self) -> torch.dtype:
        """The dtype in memory."""
        return _dtype(self.memory_dtype_name)

    @property
    def bits(self) -> int:
        """Bits of one stored scale."""
        return 8 * self.dtype.itemsize


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


_Grid = TypeVar("_Grid", ScaleGrid, "Tensor")  # as a value, or as it is saved


def grid_for(scales: Tensor) -> ScaleGrid:
    """Make the grid for a weight whose absmax scales are `scales`, any float shape; only those above zero count."""
    live = scales[scales > 0].double()
    low, high = (live.min().item() * BELOW, live.max().item() * ABOVE) if len(live) else (1.0, 1.0)
    top, bottom = (math.log2(min(max(v, SMALLEST_NORMAL), 2.0**127)) for v in (high, low))
    bottom = max(bottom, top - MOST_OCTAVES)
    step = _float32(max((top - bottom) / (LEVELS - 1), 2.0**-20))
    return ScaleGrid(_float32(bottom), step)


def _float32(value: float) -> float:
    result: float = struct.unpack("f", struct.pack("f", value))[0]
    return result


def grid_tensor(grid: ScaleGrid) -> Tensor:
    """Return float32 [2] (low, step), as it is saved."""
    import torch

    return torch.tensor([grid.low, grid.step])


def to_grid(scale: Tensor, grid: ScaleGrid) -> Tensor:
    """Return the nearest k (by ratio) of float scales > 0, int64, same shape."""
    k = (scale.double().log2() - grid.low) / grid.step
    return k.round_().clamp_(0, LEVELS - 1).long()


def on_grid(scale: Tensor, grid: ScaleGrid | None) -> Tensor:
    """Round float scales > 0 to the nearest of the grid, float32, same shape. Raises AfpqError without a grid."""
    grid = _required(grid)
    return _magnitudes(grid, scale.device)[to_grid(scale, grid)]


@lru_cache(maxsize=256)
def _magnitudes(grid: ScaleGrid, device: torch.device) -> Tensor:
    import torch

    k = torch.arange(LEVELS, dtype=torch.float64, device=device)
    return torch.exp2(grid.low + grid.step * k).float()


def to_bytes(scale: Tensor, grid: ScaleGrid | None) -> Tensor:
    """Encode scales on the grid, of either sign, as uint8, same shape. Raises AfpqError without a grid."""
    import torch

    return (to_grid(scale.abs(), _required(grid)) + SIGN * (scale < 0)).to(torch.uint8)


def from_bytes(stored: Tensor, grid: Tensor | None) -> Tensor:
    """Decode uint8 by the saved grid, float32 [2], to float32 scales, same shape. Raises AfpqError without a grid."""
    import torch

    grid = _required(grid)
    k = torch.arange(LEVELS, dtype=torch.float64, device=grid.device)
    magnitudes = torch.exp2(grid[0].double() + grid[1].double() * k).float()
    return torch.cat([magnitudes, -magnitudes])[stored.int()]


def _required(grid: _Grid | None) -> _Grid:
    if grid is None:
        raise AfpqError("scales stored as bytes need a grid")
    return grid


def _cast(scales: Tensor, grid: object, dtype: str) -> Tensor:
    return scales.to(_dtype(dtype))


def _float_storage(name: str, smallest: float) -> ScaleStorage:
    cast = partial(_cast, dtype=name)
    return ScaleStorage(name, name, name, smallest, False, round=cast, encode=cast, decode=cast)


SCALE_STORAGES = {
    storage.name: storage
    for storage in (
        _float_storage("float16", 2.0**-24),
        _float_storage("float32", SMALLEST_NORMAL),
        ScaleStorage("log8", "uint8", "float32", SMALLEST_NORMAL, True, on_grid, to_bytes, from_bytes),
    )
}


def storage_of(dtype: torch.dtype) -> ScaleStorage | None:
    """Return the storage that has this dtype on disk; None if none has."""
    return next((storage for storage in SCALE_STORAGES.values() if storage.dtype == dtype), None)


def decode_stored(stored: Tensor, grid: Tensor | None) -> Tensor:
    """Decode scales as they lie on disk, of any shape, by the storage that has their dtype.

    The ops also take scales of float dtypes that no storage has; these are returned as they are.
    """
    storage = storage_of(stored.dtype)
    return stored if storage is None else storage.decode(stored, grid)


def check_scales_finite(tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise AfpqError naming the first of a weight's saved tensors that is or decodes to NaN or Inf; no scale is."""
    import torch

    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.dtype.is_floating_point:
            continue
        if name == "scale_grid":
            reached = from_bytes(torch.arange(2 * LEVELS, device=tensor.device), tensor)
        else:
            reached = decode_stored(tensor, None)
        if not bool(torch.isfinite(reached).all()):
            raise AfpqError(f"tensor {prefix}{name} holds or makes NaN or Inf; the file is damaged, get it again")
