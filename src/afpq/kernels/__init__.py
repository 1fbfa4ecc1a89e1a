# SPDX-License-Identifier: MIT
"""The two ops, their shapes for tracing, their gradients; one schema whatever runs it.

afpq::linear      x [..., in], packed weight -> [..., out]
afpq::dequantize  packed weight -> [out, in]

`Packed` describes the operands of a weight. The codebook is one of them, so one kernel serves every format. Defined by
`torch.library.define` and `impl`, which cost a call 2-4 us; `custom_op` costs 10.

A kernel is a module as `kernel.Kernel` describes it and a row of KERNELS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.kernels import cpu, gpu, reference
from afpq.kernels.arithmetic import set_compute
from afpq.kernels.kernel import Kernel
from afpq.kernels.operands import Packed

# torch's dispatch key -> the kernel; devices without a row use the default.
DEFAULT = "default"
KERNELS: dict[str, Kernel] = {DEFAULT: reference, "CPU": cpu, "CUDA": gpu}

_WEIGHT = "Tensor qweight, Tensor scales, Tensor? scales_neg, Tensor? zeros, Tensor? grid"
_BOOK = "float[] codebook, int bits, int group_size"

torch.library.define("afpq::linear", f"(Tensor x, {_WEIGHT}, Tensor? bias, {_BOOK}) -> Tensor")
torch.library.define("afpq::dequantize", f"({_WEIGHT}, {_BOOK}, int in_features, ScalarType dtype) -> Tensor")


def _register(kernel: Kernel, key: str) -> None:
    """Register a kernel for a dispatch key: the schema's list of operands becomes one value."""

    def linear(x: Tensor, *operands: Any) -> Tensor:
        *tensors, bias, codebook, bits, group_size = operands
        return kernel.linear(x, Packed._make([*tensors, codebook, bits, group_size]), bias)

    def dequantize(*operands: Any) -> Tensor:
        *weight, in_features, dtype = operands
        return kernel.dequantize(Packed._make(weight), in_features, dtype)

    torch.library.impl("afpq::linear", key, linear)
    torch.library.impl("afpq::dequantize", key, dequantize)


for _key, _kernel in KERNELS.items():
    _register(_kernel, _key)


def prepare(values: tuple[float, ...], bits: int, device: torch.device) -> None:
    """Make what layers with this codebook keep on `device`, before they run: no CUDA graph may own it.

    `torch.compile(mode="reduce-overhead")` refuses memory that a layer allocates for itself at its first call.
    """
    KERNELS.get(device.type.upper(), KERNELS[DEFAULT]).prepare(values, bits, device)


def _linear_fake(x: Tensor, qweight: Tensor, *rest: Any) -> Tensor:
    _on_one_device([x, qweight, *rest])
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _dequantize_fake(qweight: Tensor, *rest: Any) -> Tensor:
    in_features, dtype = rest[-2:]
    _on_one_device([qweight, *rest])
    return qweight.new_empty((qweight.shape[0], in_features), dtype=dtype)


def _on_one_device(operands: list[Any]) -> None:
    """Raise AfpqError if some tensors have numbers and some only shapes: the result would look like numbers."""
    places = {operand.device for operand in operands if isinstance(operand, Tensor)}
    if len(places) > 1:
        raise AfpqError(f"operands are on {' and '.join(sorted(map(str, places)))}; move them to one device")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, scales, scales_neg, zeros, grid, bias, *book = inputs
    ctx.save_for_backward(qweight, scales, scales_neg, zeros, grid)
    ctx.book, ctx.in_features, ctx.has_bias = book, x.shape[-1], bias is not None


def _linear_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients for x and the bias; the packed weight has none."""
    grad_x = grad_bias = None
    if context.needs_input_grad[0]:
        weight = torch.ops.afpq.dequantize(*context.saved_tensors, *context.book, context.in_features, grad.dtype)
        grad_x = grad @ weight
    if context.has_bias and context.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None


torch.library.register_fake("afpq::linear", _linear_fake)
torch.library.register_fake("afpq::dequantize", _dequantize_fake)
torch.library.register_autograd("afpq::linear", _linear_backward, setup_context=_save_for_backward)

linear = torch.ops.afpq.linear
dequantize = torch.ops.afpq.dequantize

__all__ = ["KERNELS", "Kernel", "Packed", "dequantize", "linear", "prepare", "set_compute"]
