# SPDX-License-Identifier: MIT
"""The model that a result must compute like: the original classes, with the dequantized weights.

Nothing in it is ours: no layer is replaced, experts stay fused, heads tied. Weights are decoded as they are used and
kept for the unit of the plan (a block, or what is outside) that is running, so that one unit is unpacked at a time.
Everything that is not quantized is shared with the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from afpq.checkpoint.plan import Plan, Target
from afpq.errors import AfpqError
from afpq.model.experts import ExpertForm, expert_form
from afpq.model.linear import PackedModule
from afpq.model.renamed_tensors import TensorNames
from afpq.model.weight_stand_in import WeightStandIn
from afpq.numerics.packing import from_tensors


@dataclass
class UnitWeights:
    """Float weights of one unit at a time; `used`: the modules of all targets that were decoded so far."""

    model: nn.Module
    used: set[str] = field(default_factory=set)
    unit: str = ""
    held: dict[str, Tensor] = field(default_factory=dict)

    def matrix(self, target: Target) -> Tensor:
        """Decode a target's weight from the loaded model's tensors, float32 [out, in]."""
        self.used.add(target.module)
        packed = self.model.get_submodule(target.module)
        assert isinstance(packed, PackedModule)
        return from_tensors(packed.packed(), target.scheme, target.shape[1]).dequantize()

    def get(self, unit: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the weight called `name`, made by `make` unless it is held; drop those of the unit before."""
        if unit != self.unit:
            self.unit, self.held = unit, {}
        if name not in self.held:
            self.held[name] = make()
        return self.held[name]

    def stand_in(self, unit: str, name: str, shape: torch.Size, make: Callable[[], Tensor]) -> nn.Parameter:
        """Return a parameter that is decoded whenever it is used."""
        made = WeightStandIn(lambda: self.get(unit, name, make), shape, torch.float32, torch.device("cpu"))
        made._is_param = True  # for torch it is a parameter
        return made  # type: ignore[return-value]


def unit_bytes(plan: Plan) -> int:
    """Return the bytes of the largest unit's weights in float32, which a run of the reference model decodes."""
    return max((4 * sum(target.elements for target in unit.targets) for unit in plan.units), default=0)


def fill_reference(reference: PreTrainedModel, model: nn.Module, plan: Plan) -> UnitWeights:
    """Give the architecture `reference` (original classes, on the meta device) the weights of a loaded result.

    Raises AfpqError for a parameter that the loaded model does not have.
    """
    weights = UnitWeights(model)
    loaded: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    loaded |= dict(model.named_buffers(remove_duplicate=False))
    units = {target.module: (unit.name, target) for unit in plan.units for target in unit.targets}
    if plan.ends.tied and plan.ends.embedding in units:
        units[plan.ends.head or ""] = units[plan.ends.embedding]
    leaves = TensorNames(reference).leaves()
    for name, module in reference.named_modules():
        form = expert_form(module, leaves)
        prefix = f"{name}." if name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if prefix + leaf in loaded:
                found: Tensor | None = loaded[prefix + leaf]
            elif leaf == "weight" and name in units:
                found = _matrix(weights, module, parameter.shape, *units[name])
            else:
                found = None if form is None else _experts(weights, name, form, leaf, parameter.shape, units, loaded)
            if found is None:
                raise AfpqError(f"{prefix}{leaf} is not in the loaded model")
            module._parameters[leaf] = found
        for leaf in module._buffers:
            module._buffers[leaf] = loaded.get(prefix + leaf, module._buffers[leaf])
    return weights


def _matrix(weights: UnitWeights, module: nn.Module, shape: torch.Size, unit: str, target: Target) -> Tensor:
    turned = isinstance(module, Conv1D)

    def make() -> Tensor:
        weight = weights.matrix(target)
        return weight.T if turned else weight

    return weights.stand_in(unit, target.module, shape, make)


def _experts(
    weights: UnitWeights,
    place: str,
    form: ExpertForm,
    leaf: str,
    shape: torch.Size,
    units: Mapping[str, tuple[str, Target]],
    loaded: Mapping[str, Tensor],
) -> Tensor | None:
    """A fused parameter of experts, put together of those of their linears."""
    parts = [(f"{place}.{linear}", kind, part) for linear, kind, part in form.parts() if part.tensor == leaf]

    def make() -> Tensor:
        fused = torch.empty(shape)
        for linear, kind, part in parts:
            value = loaded[f"{linear}.bias"] if kind == "bias" else weights.matrix(units[linear][1])
            part.of(fused).copy_(value)
        return fused

    if not parts:
        return None
    if parts[0][1] == "bias":
        return nn.Parameter(make(), requires_grad=False)
    return weights.stand_in(units[parts[0][0]][0], f"{place}.{leaf}", shape, make)
