# SPDX-License-Identifier: MIT
"""AfpqLinear: the packed weight as buffers and one op call. PackedModule: the buffers alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from afpq import kernels
from afpq.errors import AfpqError
from afpq.model.weight_stand_in import WeightStandIn
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import from_tensors, layout, to_tensors
from afpq.numerics.scale_storage import check_scales_finite
from afpq.numerics.scheme import Scheme


class NoWeight(AfpqError, AttributeError):
    """The error for reading the float weight of a packed module; for `hasattr` the attribute is missing."""


class PackedModule(nn.Module):
    """A matrix [rows, columns] packed by its scheme, in buffers.

    `packing.layout` gives the buffers' names, shapes and dtypes: `qweight` and `scales_pos` + `scales_neg`, `scales`,
    or `scales` + `zeros`, and `scale_grid` if their storage needs one. Scales keep their dtype under `.to(dtype)` and
    `.half()`: they are storage, not arithmetic.
    """

    qweight: Tensor
    scheme: Scheme

    def __init__(self, rows: int, columns: int, scheme: Scheme, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.scheme = rows, columns, scheme
        for name, (dtype, shape) in layout(scheme, rows, columns).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors that are saved, by the names of `packing.layout`."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def fill(self, weight: QuantizedWeight) -> None:
        """Set the buffers to a quantized weight's tensors."""
        for name, tensor in to_tensors(weight).items():
            self._buffers[name] = tensor.contiguous()

    def quantized_weight(self) -> QuantizedWeight:
        """Return the codes and scales, unpacked."""
        return from_tensors(self.packed(), self.scheme, self.columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix, [rows, columns]."""
        return self.quantized_weight().dequantize(dtype)

    def _scale_buffers(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return the arguments of the ops after `qweight`: scales, scales_neg, zeros, grid."""
        packed = self.packed()
        first = packed["scales_pos" if self.scheme.two_scales else "scales"]
        return first, packed.get("scales_neg"), packed.get("zeros"), packed.get("scale_grid")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; `weight` may be one, as a loading slot, although reading it decodes."""
        if name == "weight":
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "weight":
                raise
            raise NoWeight(
                f"{type(self).__name__} holds codes ({self.scheme}), no weight; `dequantize()` gives it. What changes "
                "weights, such as resize_token_embeddings, has to come before quantizing"
            ) from None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Move everything, but undo a cast of the scales: rounding them to bfloat16 would change the weights."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.prepare()
        return self

    def check_scales(self, name: str) -> None:
        """Raise AfpqError if scales of this layer, called `name`, are NaN or Inf."""
        check_scales_finite({part: buffer for part, buffer in self._buffers.items() if buffer is not None}, f"{name}.")

    def prepare(self) -> None:
        """Build the tables that its device's kernels need, before the first call; moving a layer does so too."""
        kernels.prepare(self.scheme.format.values, self.scheme.format.bits, self.qweight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Refuse a tensor of another dtype, which torch would cast silently, and scales that are NaN or Inf."""
        given = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
        for name, tensor in tensors.items():
            expected = self._buffers[name]
            if expected is not None and tensor.dtype != expected.dtype:
                raise AfpqError(f"tensor {prefix + name} is {tensor.dtype}; {self.scheme} stores {expected.dtype}")
            if expected is not None and tensor.shape == expected.shape:
                check_scales_finite({name: tensor}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class AfpqLinear(PackedModule):
    """A linear layer whose weight is packed; gradients reach the input and the bias."""

    bias: nn.Parameter | None
    readable = True  # whether `weight` can be read; not for a head, which some callers would resize by it
    conv1d = False  # whether it replaces a Conv1D, whose weight is [in, out]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()  # of `weight`
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> AfpqLinear:
        """Make the layer that computes x @ weight.dequantize().T + bias; `dtype` is that of the float weight."""
        out_features, in_features = weight.codes.shape
        layer = cls(in_features, out_features, weight.scheme, device="meta", dtype=dtype)
        layer.fill(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features] in x's dtype. Raises AfpqError for another width of x."""
        if x.shape[-1] != self.in_features:
            raise AfpqError(f"input of {x.shape[-1]} features for a layer of {self.in_features}")
        codebook = self.scheme.format
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = kernels.linear(
            x, self.qweight, *self._scale_buffers(), bias, codebook.values, codebook.bits, self.scheme.group_size
        )
        return y

    def __getattr__(self, name: str) -> Any:
        """Give `weight`, decoded once it is computed with, for code that reads it (Mamba's, T5's)."""
        if name != "weight" or "weight" in self._parameters or not self.readable:
            return super().__getattr__(name)
        shape = (self.in_features, self.out_features) if self.conv1d else (self.out_features, self.in_features)
        if self.qweight.is_meta:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if torch.compiler.is_compiling():  # an op, which the compiler drops if only its dtype or shape is read
            codebook = self.scheme.format
            weight: Tensor = kernels.dequantize(
                self.qweight, *self._scale_buffers(), codebook.values, codebook.bits, self.scheme.group_size,
                self.in_features, self.dtype,
            )  # fmt: skip
            return weight.T if self.conv1d else weight
        return WeightStandIn(cache(self._float_weight), shape, self.dtype, self.qweight.device)

    def _float_weight(self) -> Tensor:
        weight = self.dequantize(self.dtype)
        return weight.T if self.conv1d else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AfpqLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}, bias={bias}"
