# SPDX-License-Identifier: MIT
"""The ops on CPUs: checks, and calls into the native library (csrc/), which reads weights as they are saved.

Two arithmetics. "exact": float32 throughout, within 1e-5 of the reference, relative to sum |w x|; the weight is not
rounded to the dtype of x. "int8": inputs are rounded to 8 bits, one step for 128 of them, and weights to 7, for up to
6 tokens at a time; more tokens are exact. On processors with AMX, bfloat16 inputs of 8 tokens or more are multiplied in
bfloat16 with float32 sums: weights are rounded to bfloat16, and numbers below the smallest normal one, 2^-126, count as
zero, in inputs, weights and sums (the instruction has no other mode). All other numbers are unaffected.

Threads are those of torch: the library calls torch_parallel_for, so `torch.set_num_threads` sets their number. If the
library was not built (no compiler) or cannot run, the reference computes everything; a warning states it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from afpq.kernels import reference
from afpq.kernels.arithmetic import compute_mode
from afpq.kernels.cpu_library import KINDS, SCALE_KINDS, WIDTHS, NativeLibrary, Weight, check_error, describe, native
from afpq.kernels.operands import Packed

FAST_BITS: tuple[int, ...] = WIDTHS
FAST_SCALES: tuple[torch.dtype, ...] = tuple(SCALE_KINDS)
MANY_TOKENS = 160  # from which on decoding panels for torch's own matrix product is faster
PANEL_BYTES = 4 << 20  # of decoded weights, to stay in a cache


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """See `Kernel.linear`; the weight is not rounded to the dtype of x."""
    library = native()
    columns = weight.check_inputs(x, bias)
    described = describe(weight, columns)
    if library is None or described is None or x.dtype not in KINDS or columns == 0:
        return reference.linear(x, weight, bias)
    x = x.contiguous()
    rows = weight.qweight.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    tokens = x.numel() // columns
    if tokens == 0 or rows == 0:
        return y
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if tokens >= MANY_TOKENS:
        return _many(library, described, x.view(tokens, columns), bias, y)
    kind = KINDS[x.dtype]
    address = None if bias is None else bias.data_ptr()
    int8 = compute_mode() == "int8"
    check_error(library.library.afpq_linear(described, x.data_ptr(), kind, tokens, address, y.data_ptr(), int8))
    return y


def _many(library: NativeLibrary, described: Weight, x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Multiply x [tokens, in] by panels of decoded rows, by torch; in float32 if the machine has no faster 16 bits."""
    rows, columns = described.rows, described.columns
    dtype = x.dtype if library.isa == "amx" and x.dtype == torch.bfloat16 else torch.float32
    inputs, out = x.to(dtype), y.view(len(x), rows)
    size = max(16, PANEL_BYTES // (dtype.itemsize * columns))
    panel = torch.empty(min(size, rows), columns, dtype=dtype)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        check_error(library.library.afpq_dequantize(described, first, last, KINDS[dtype], panel.data_ptr()))
        product = inputs @ panel[: last - first].T
        out[:, first:last] = product if bias is None else product.add_(bias[first:last])
    return y


def dequantize(weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """See `Kernel.dequantize`."""
    library = native()
    described = describe(weight, in_features)
    if library is None or described is None or dtype not in KINDS or in_features == 0:
        return reference.dequantize(weight, in_features, dtype)
    rows = weight.qweight.shape[0]
    out = torch.empty(rows, in_features, dtype=dtype)
    check_error(library.library.afpq_dequantize(described, 0, rows, KINDS[dtype], out.data_ptr()))
    return out


def prepare(values: tuple[float, ...], bits: int, device: torch.device) -> None:
    """Do nothing: codebooks are cached at the first call."""
