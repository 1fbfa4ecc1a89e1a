# SPDX-License-Identifier: MIT
"""AfpqLinear: the packed weight as buffers and one op call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from afpq import kernels
from afpq.errors import AfpqError
from afpq.groups import QuantizedWeight
from afpq.packing import from_tensors, layout, to_tensors
from afpq.scheme import Scheme


class AfpqLinear(nn.Module):
    """A linear layer whose weight is stored as its scheme says; gradients reach the input and the bias.

    Buffers are named, shaped and typed by `packing.layout`: `qweight` and `scales_pos` + `scales_neg`, `scales`, or
    `scales` + `zeros`, and `scale_grid` where scales are bytes. Scales keep their dtype under `.to(dtype)` and
    `.half()`: they are storage, not arithmetic.
    """

    qweight: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for name, (stored, shape) in layout(scheme, out_features, in_features).items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> AfpqLinear:
        """The layer that computes x @ weight.dequantize().T + bias; weight [out, in], bias [out]."""
        out_features, in_features = weight.codes.shape
        layer = cls(in_features, out_features, weight.scheme, device="meta")
        for name, tensor in to_tensors(weight).items():
            layer._buffers[name] = tensor.contiguous()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def _scale_buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        buffers = self._buffers
        first = buffers["scales_pos" if self.scheme.two_scales else "scales"]
        assert first is not None
        return first, buffers.get("scales_neg"), buffers.get("zeros"), buffers.get("scale_grid")

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x. Raises AfpqError for another width of x."""
        if x.shape[-1] != self.in_features:
            raise AfpqError(f"input of {x.shape[-1]} features for a layer of {self.in_features}")
        book = self.scheme.format
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = kernels.linear(
            x, self.qweight, *self._scale_buffers(), bias, book.values, book.bits, self.scheme.group_size
        )
        return y

    def quantized_weight(self) -> QuantizedWeight:
        """The codes and scales, unpacked."""
        tensors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return from_tensors(tensors, self.scheme, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, [out_features, in_features]."""
        return self.quantized_weight().dequantize(dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}, bias={bias}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AfpqLinear:
        """Moves everything, but undoes a cast of the scales: rounding them to bfloat16 would change the weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.prepare()
        return self

    def prepare(self) -> None:
        """Make what the kernels of its device keep, before the first call; moving a layer does it by itself."""
        kernels.prepare(self.scheme.format.values, self.scheme.format.bits, self.qweight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Refuses a tensor of another dtype, which torch would cast without a word."""
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if given is not None and buffer is not None and given.dtype != buffer.dtype:
                raise AfpqError(f"tensor {prefix + name} is {given.dtype}; {self.scheme} stores {buffer.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *arguments)
