# SPDX-License-Identifier: MIT
"""The op in plain torch: the definition of right, for every device and every scheme."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from afpq.errors import AfpqError
from afpq.kernels.operands import Packed
from afpq.numerics.groups import decode
from afpq.numerics.packing import packed_size, scales_of, unpack

# Weights unpacked at a time by `linear`: an output head of 8 bits would take gigabytes whole, and miss all caches.
PART, PART_ON_CPU = 2**26, 2**20


def dequantize(weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """-> [out, in_features] in `dtype`."""
    weight.check(in_features)
    if not dtype.is_floating_point:
        raise AfpqError(f"a weight cannot be given as {dtype}; choose a type of floats")
    qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = weight
    span = max(1, in_features) if group_size == -1 else group_size
    codes = unpack(qweight, bits, in_features)
    return decode(codes, scales_of(scales, scales_neg, zeros, grid, bits), codebook, span).to(dtype)


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] -> x @ w_hat^T + bias, [..., out], in the dtype of x; w_hat is rounded to that dtype first."""
    columns, rows = weight.check_inputs(x, bias), weight.qweight.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    part = PART_ON_CPU if x.device.type == "cpu" else PART
    height = max(8, part // max(columns, 1) // 8 * 8)  # whole bytes of zero points
    if rows <= height:
        return torch_linear(x, dequantize(weight, columns, x.dtype), bias)
    starts = range(0, rows, height)
    parts = [torch_linear(x, dequantize(_rows(weight, first, height), columns, x.dtype)) for first in starts]
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias


def _rows(weight: Packed, first: int, count: int) -> Packed:
    """Rows [first, first + count) of a weight; both are multiples of 8."""
    rows = slice(first, first + count)
    packed = slice(packed_size(first, weight.bits), packed_size(first + count, weight.bits))
    return weight._replace(
        qweight=weight.qweight[rows],
        scales=weight.scales[rows],
        scales_neg=None if weight.scales_neg is None else weight.scales_neg[rows],
        zeros=None if weight.zeros is None else weight.zeros[:, packed],
    )
