# SPDX-License-Identifier: MIT
"""Merge LoRA adapters into a quantized weight: as a float module, or rounded to its own scheme again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afpq.algorithms import quantize_rtn
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
