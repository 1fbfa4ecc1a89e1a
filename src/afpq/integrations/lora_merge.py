# SPDX-License-Identifier: MIT
"""Merge LoRA adapters into a quantized weight: as a float module, or rounded to its own scheme again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.model.blocks import replace_module
from afpq.model.experts import find_experts, fuse_experts
from afpq.model.linear import PackedModule
from afpq.numerics.groups import QuantizedWeight, encode


@dataclass(frozen=True)
class MergeTarget:
    """The result of a merge: a float module of `dtype`, or with `requantize` the layer's own scheme again."""

    dtype: torch.dtype = torch.float32
    requantize: bool = False


def requantized(old: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """Round float32 [out, in] to the scheme of `old`: with its scales or newly searched ones, whichever is nearer.

    The old scales suit a weight that has hardly changed: its other values are already exact with them.
    """
    kept = QuantizedWeight(encode(weight, old.scales, old.scheme), old.scales, old.scheme)
    searched = quantize_rtn(weight, old.scheme, "mse")
    return min(kept, searched, key=lambda rounded: (rounded.dequantize() - weight).square().sum().item())


def relative_size(error: Tensor, change: Tensor) -> float:
    """Return the norm of the error relative to that of the change; 0 for no change."""
    size = change.norm().item()
    return error.norm().item() / size if size else 0.0


def list_as_float(model: Any, floats: list[str]) -> None:
    """List these modules as not quantized in the config; without quantized modules, remove the config."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not floats:
        return
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        quantizer.remove_quantization_config(model)
        return
    config = model.config.quantization_config
    config.modules_to_not_convert = sorted({*config.modules_to_not_convert, *floats})


def check_experts(model: nn.Module, adapted: list[str]) -> None:
    """Raise AfpqError if only some linears of a module of experts would become floats: files hold all or none so."""
    for name, experts in find_experts(model).items():
        linears = experts.form.linears()
        count = len({f"{name}.{linear}" for linear in linears} & set(adapted))
        if 0 < count < len(linears):
            raise AfpqError(
                f"{name}: {count} of its {len(linears)} linears have an adapter, and experts are stored as floats all "
                "or none: merge with requantize=True, or adapt all of them"
            )


def fuse_float_experts(model: Any) -> None:
    """Make fused modules of experts whose linears are all floats, as a float model has and saves them."""
    for name, split in find_experts(model).items():
        if not any(isinstance(module, PackedModule) for module in split.modules()):
            replace_module(model, name, fuse_experts(split))
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        model._weight_conversions = None  # those of a quantized model; with None it is saved as a float model
