# SPDX-License-Identifier: MIT
"""Transformers' conversion step that quantizes each weight as it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from afpq.algorithms.rtn import quantize_named
from afpq.errors import AfpqError
from afpq.model.experts import AfpqExperts
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import to_tensors
from afpq.numerics.scheme import Scheme


class QuantizeLoaded(ConversionOps):  # type: ignore[misc]
    """The conversion of a loaded weight to the buffers of its AfpqLinear.

    Errors go to `failures`: Transformers would swallow them. `search` is the scale search.
    """

    def __init__(self, failures: list[AfpqError], search: str) -> None:
        self.failures, self.search = failures, search

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            parent, _dot, leaf = str(name).rpartition(".")
            module = model.get_submodule(parent)
            for layer_name, part, kind in _parts(module, parent, leaf, weight):
                layer = model.get_submodule(layer_name)
                assert isinstance(layer, PackedModule)
                if kind == "bias":
                    tensors[f"{layer_name}.bias"] = part.contiguous()
                    continue
                solved = self._solve(f"{layer_name}.weight", part, layer.scheme)
                layer.scheme = replace(layer.scheme, format=solved.scheme.format)  # a codebook may have been learned
                packed = to_tensors(solved)
                tensors |= {f"{layer_name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
            del module._parameters[leaf]
            if missing_keys is not None:
                missing_keys.discard(name)
        return tensors

    def _solve(self, name: str, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        try:
            return quantize_named(name, weight, scheme, self.search)
        except AfpqError as error:
            # Raised once all is loaded, so this stand-in is never used.
            self.failures.append(error)
            return quantize_named(name, torch.zeros_like(weight), scheme, "absmax")


def _parts(module: nn.Module, name: str, leaf: str, weight: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """Yield (linear, its weight or bias, "weight" or "bias") for all that a loaded parameter holds."""
    if not isinstance(module, AfpqExperts):
        conv1d = isinstance(module, AfpqLinear) and module.conv1d
        yield name, weight.T if conv1d else weight, "weight"
        return
    for linear, kind, part in module.form.parts():
        if part.tensor == leaf:
            yield f"{name}.{linear}", part.of(weight), kind
