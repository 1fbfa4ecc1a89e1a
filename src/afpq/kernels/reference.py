# SPDX-License-Identifier: MIT
"""The op in plain torch: the definition of right, for every device and every scheme."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from afpq.errors import AfpqError
from afpq.groups import decode
from afpq.kernels.packed import Packed
from afpq.packing import scales_of, unpack


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
    columns = weight.check_inputs(x, bias)
    bias = None if bias is None else bias.to(x.dtype)
    return torch_linear(x, dequantize(weight, columns, x.dtype), bias)
