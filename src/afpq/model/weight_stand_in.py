# SPDX-License-Identifier: MIT
"""A tensor in the place of a packed weight: its shape, dtype and device are there, its values once they are needed.

Code of models looks at weights without computing with them (T5 compares dtypes in every forward, PEFT reads devices,
`hasattr` asks for the attribute itself); decoding a matrix for that would take longer than the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# What can be answered without values. Whatever is not listed decodes, so that nothing can be wrong, only slow.
_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "is_meta", "is_cpu",
    "is_cuda", "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "names", "_is_param",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "is_floating_point", "is_complex",
    "is_signed", "__len__", "__hash__",
)  # fmt: skip
_WITHOUT_VALUES = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
_WITHOUT_VALUES |= {getattr(Tensor, name) for name in _METHODS}
_WITHOUT_VALUES |= {torch.is_floating_point, torch.is_complex, torch.is_signed, torch.numel}


class WeightStandIn(Tensor):
    """A tensor of this shape, dtype and device, which calls `decode` for its values at each use of them."""

    _decode: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[WeightStandIn],
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> WeightStandIn:
        made: WeightStandIn = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made._decode = decode
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Answer from the shape, dtype and device if they suffice; else compute with the values."""
        if func in _WITHOUT_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_decoded(args), **_decoded(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Compute with the values, for code below Python that receives this tensor."""
        return func(*_decoded(args), **_decoded(kwargs or {}))


def _decoded(value: Any) -> Any:
    """Replace every stand-in inside tuples, lists and dicts by its values."""
    if isinstance(value, WeightStandIn):
        return value._decode()
    if type(value) in (tuple, list):
        return type(value)(map(_decoded, value))
    return {key: _decoded(each) for key, each in value.items()} if type(value) is dict else value
