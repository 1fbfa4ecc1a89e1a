# SPDX-License-Identifier: MIT
"""The operands that describe a packed weight, as one value, and the check that they fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.formats import BITS
from afpq.numerics.packing import pack, packed_size, unpack
from afpq.numerics.scale_storage import storage_of
from afpq.numerics.scheme import Scheme

BOOKS = 2**15  # codebooks whose checks and tables are cached: a learned one for each layer, or for each expert


class Packed(NamedTuple):
    """A packed weight, with the fields in the order of the ops' schema; tensors as `packing.layout` describes them.

    Attributes:
        qweight: uint8 [out, bytes of a row], codes as one stream of bits.
        scales: [out, groups], floats, or uint8 together with a grid.
        scales_neg: the same for negative values; None if one scale serves both signs.
        zeros: uint8 [groups, bytes], zero points packed along the rows; None without them.
        grid: float32 [2], low and step of scales that are bytes; None if scales are floats.
        codebook: at most 2^bits values.
        bits: of a code.
        group_size: inputs of a group; -1 for one group a row.
    """

    qweight: Tensor
    scales: Tensor
    scales_neg: Tensor | None
    zeros: Tensor | None
    grid: Tensor | None
    codebook: list[float]
    bits: int
    group_size: int

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Scheme) -> Packed:
        """Return the operands of a weight from its saved tensors, by the names of `packing.layout`."""
        first, book = "scales_pos" if scheme.two_scales else "scales", scheme.format
        neg, zeros, grid = (tensors.get(name) for name in ("scales_neg", "zeros", "scale_grid"))
        values = list(book.values)
        return cls(tensors["qweight"], tensors[first], neg, zeros, grid, values, book.bits, scheme.group_size)

    def arguments(self, bias: Tensor | None = None) -> tuple[object, ...]:
        """Return what `kernels.linear` takes after x."""
        return (*self[:5], bias, *self[5:])

    def rows(self, first: int, last: int) -> Packed:
        """Return the operands of rows [first, last); a slice ends at the last row, as in Python.

        Views, except zero points of rows that do not begin on a whole byte: these are packed anew.
        """
        zeros = self.zeros
        if zeros is not None:
            zeros = zeros_of_rows(zeros, self.bits, len(self.qweight), first, last)
        return self._replace(
            qweight=self.qweight[first:last],
            scales=self.scales[first:last],
            scales_neg=None if self.scales_neg is None else self.scales_neg[first:last],
            zeros=zeros,
        )

    def check(self, columns: int) -> tuple[int, int]:
        """Return (groups of a row, bytes of a group's zero points) for rows of so many columns.

        Kernels address memory by these operands, so the check comes before any of them. Raises AfpqError that names
        what does not fit.
        """
        qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = self
        if qweight is None or scales is None:  # torch accepts None for a tensor
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
        """Return the columns of x. Raises AfpqError unless it has a dimension, and the bias one number for each row."""
        if x is None or self.qweight is None or x.dim() == 0 or self.qweight.dim() != 2:
            raise AfpqError("inputs [..., in_features] and a qweight of two dimensions are needed")
        if bias is not None and bias.shape != self.qweight.shape[:1]:
            raise AfpqError(f"bias is {list(bias.shape)}, expected {list(self.qweight.shape[:1])}")
        return x.shape[-1]


def zeros_of_rows(zeros: Tensor, bits: int, size: int, first: int, last: int) -> Tensor:
    """Return the zero points [groups, bytes] of rows [first, last), from those of `size` rows; a view if possible."""
    last = min(last, size)
    if first % 8:  # whole bytes at any width
        return pack(unpack(zeros, bits, size)[:, first:last], bits)
    part = zeros[:, packed_size(first, bits) : packed_size(last, bits)]
    return part if last % 8 == 0 or last == size else pack(unpack(part, bits, last - first), bits)  # padded with zeros


@lru_cache(maxsize=BOOKS)
def _counts(values: tuple[float, ...]) -> bool:
    """Return whether a codebook is of consecutive integers. Raises AfpqError for NaN or Inf in it."""
    if not all(map(math.isfinite, values)):
        raise AfpqError("the code book holds NaN or Inf")
    return all(b - a == 1 for a, b in pairwise(values))
