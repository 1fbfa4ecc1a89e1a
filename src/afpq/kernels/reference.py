# SPDX-License-Identifier: MIT
"""The ops in plain torch: the definition of right, for every device and every scheme."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from afpq.errors import AfpqError
from afpq.kernels.operands import Packed
from afpq.numerics.groups import decode
from afpq.numerics.packing import scales_of, unpack

FAST_BITS: tuple[int, ...] = ()  # see `kernel.Kernel`
FAST_SCALES: tuple[torch.dtype, ...] = ()
# Weights unpacked at a time by `linear`: an output head of 8 bits would take gigabytes whole, and miss all caches.
PART, PART_ON_CPU = 2**26, 2**20


def dequantize(weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """Decode a weight -> [out, in_features] in `dtype`. Raises AfpqError for operands that do not fit together."""
    weight.check(in_features)
    if not dtype.is_floating_point:
        raise AfpqError(f"a weight cannot be given as {dtype}; choose a type of floats")
    qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = weight
    span = max(1, in_features) if group_size == -1 else group_size
    codes = unpack(qweight, bits, in_features)
    return decode(codes, scales_of(scales, scales_neg, zeros, grid, bits), codebook, span).to(dtype)


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Compute x [..., in] @ w_hat^T + bias -> [..., out], in the dtype of x; w_hat is rounded to that dtype first."""
    columns, rows = weight.check_inputs(x, bias), weight.qweight.shape[0]
    weight.check(columns)
    bias = None if bias is None else bias.to(x.dtype)
    part = PART_ON_CPU if x.device.type == "cpu" else PART
    height = max(8, part // max(columns, 1) // 8 * 8)  # whole bytes of zero points
    if rows <= height:
        return torch_linear(x, dequantize(weight, columns, x.dtype), bias)
    starts = range(0, rows, height)
    parts = [torch_linear(x, dequantize(weight.rows(n, n + height), columns, x.dtype)) for n in starts]
    y = torch.cat(parts, -1)
    return y if bias is None else y + bias


def prepare(values: tuple[float, ...], bits: int, device: torch.device) -> None:
    """Do nothing: no table is kept."""
