# SPDX-License-Identifier: MIT
"""What the ops take for a weight, as one value; and the check that it fits together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.packing import packed_size


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

        Kernels address memory by what these say. Raises AfpqError that names what does not fit.
        """
        qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = self
        rows, row_bytes = qweight.shape
        groups = 1 if group_size == -1 else -(-columns // group_size)
        if row_bytes != packed_size(columns, bits) or qweight.dtype != torch.uint8:
            raise AfpqError(
                f"qweight {list(qweight.shape)} {qweight.dtype} does not hold {columns} codes of {bits} bits a row"
            )
        for name, tensor in (("scales", scales), ("scales_neg", scales_neg)):
            if tensor is not None and (tensor.shape != (rows, groups) or tensor.dtype != scales.dtype):
                raise AfpqError(
                    f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {[rows, groups]} {scales.dtype}"
                )
        if (scales.dtype == torch.uint8) != (grid is not None):
            raise AfpqError(f"scales are {scales.dtype}, and {'no' if grid is None else 'a'} grid is given")
        if grid is not None and (grid.shape != (2,) or grid.dtype != torch.float32):
            raise AfpqError(f"scale_grid is {list(grid.shape)} {grid.dtype}, expected [2] torch.float32")
        zero_bytes = 0
        if zeros is not None:
            zero_bytes = packed_size(rows, bits)
            if zeros.shape != (groups, zero_bytes) or zeros.dtype != torch.uint8:
                raise AfpqError(
                    f"zeros is {list(zeros.shape)} {zeros.dtype}, expected {[groups, zero_bytes]} torch.uint8"
                )
        if len(codebook) > 2**bits:
            raise AfpqError(f"a code book of {len(codebook)} values does not fit {bits} bits")
        return groups, zero_bytes
