# SPDX-License-Identifier: MIT
"""What the ops take for a weight, as one value; and the check that it fits together."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.formats import BITS
from afpq.numerics.packing import packed_size
from afpq.numerics.scale_storage import storage_of

BOOKS = 2**15  # code books whose checks and tables are remembered: a learned one for each layer, or each expert's


class Packed(NamedTuple):
    """A packed weight as the ops' schema lists it; tensors as `packing.layout` describes them.

    `scales_neg` is None where one scale serves both signs, `zeros` where there is no zero point, `grid` where scales
    are floats. `codebook` has at most 2^bits values.
    """

    qweight: Tensor
    scales: Tensor
    scales_neg: Tensor | None
    zeros: Tensor | None
    grid: Tensor | None
    codebook: list[float]
    bits: int
    group_size: int

    def check(self, columns: int) -> tuple[int, int]:
        """(groups of a row, bytes of a group's zero points), for rows of so many columns.

        Kernels address memory by what these say, so it comes before any of them. Raises AfpqError that names what does
        not fit.
        """
        qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = self
        if qweight is None or scales is None:  # which torch lets pass for a tensor
            raise AfpqError("a weight needs qweight and scales")
        if bits not in BITS or columns < 0 or (group_size < 1 and group_size != -1):
            raise AfpqError(f"{bits} bits, {columns} columns in groups of {group_size}: no such weight")
        if qweight.dim() != 2 or qweight.shape[1] != packed_size(columns, bits) or qweight.dtype != torch.uint8:
            raise AfpqError(
                f"qweight {list(qweight.shape)} {qweight.dtype} does not hold {columns} codes of {bits} bits a row"
            )
        rows, groups = len(qweight), 1 if group_size == -1 else -(-columns // group_size)
        storage = storage_of(scales.dtype)
        if storage is None and not scales.dtype.is_floating_point:
            raise AfpqError(f"scales are {scales.dtype}; expected floats, or bytes and a scale_grid")
        for name, tensor in (("scales", scales), ("scales_neg", scales_neg)):
            if tensor is not None and (tensor.shape != (rows, groups) or tensor.dtype != scales.dtype):
                raise AfpqError(
                    f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {[rows, groups]} {scales.dtype}"
                )
        if (storage is not None and storage.needs_grid) != (grid is not None):
            raise AfpqError(f"scales are {scales.dtype}, and {'no' if grid is None else 'a'} grid is given")
        if grid is not None and (grid.shape != (2,) or grid.dtype != torch.float32):
            raise AfpqError(f"scale_grid is {list(grid.shape)} {grid.dtype}, expected [2] torch.float32")
        if len(codebook) > 2**bits:
            raise AfpqError(f"a code book of {len(codebook)} values does not fit {bits} bits")
        zero_bytes, counts = 0, _counts(tuple(codebook)) and len(codebook) == 2**bits
        if zeros is not None:
            if scales_neg is not None or not counts:
                raise AfpqError("zero points are for one scale and a whole code book of consecutive integers")
            zero_bytes = packed_size(rows, bits)
            if zeros.shape != (groups, zero_bytes) or zeros.dtype != torch.uint8:
                raise AfpqError(
                    f"zeros is {list(zeros.shape)} {zeros.dtype}, expected {[groups, zero_bytes]} torch.uint8"
                )
        return groups, zero_bytes

    def check_inputs(self, x: Tensor, bias: Tensor | None) -> int:
        """Columns of x. Raises AfpqError unless it has some dimension, and the bias one number for each row."""
        if x is None or self.qweight is None or x.dim() == 0 or self.qweight.dim() != 2:
            raise AfpqError("inputs [..., in_features] and a qweight of two dimensions are needed")
        if bias is not None and bias.shape != self.qweight.shape[:1]:
            raise AfpqError(f"bias is {list(bias.shape)}, expected {list(self.qweight.shape[:1])}")
        return x.shape[-1]


@lru_cache(maxsize=BOOKS)
def _counts(values: tuple[float, ...]) -> bool:
    """Whether a code book is of consecutive integers. Raises AfpqError for NaN or Inf in it."""
    if not all(map(math.isfinite, values)):
        raise AfpqError("the code book holds NaN or Inf")
    return all(b - a == 1 for a, b in pairwise(values))
