# SPDX-License-Identifier: MIT
"""Decide everything before a weight is read: which tensor is quantized how, and what the output will hold.

The plan comes from headers alone. It knows the name, dtype and shape of every output tensor, so the writer can lay
the files out beforehand, and sizes can be told without a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from afpq.blocks import find_blocks, find_linears
from afpq.errors import AfpqError
from afpq.packing import Spec, layout, spec_bytes
from afpq.scheme import Recipe, Scheme
from afpq.source import Checkpoint, find_tensor

OUTSIDE = "outside the blocks"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A linear to quantize: the module's name, its weight's tensor in the checkpoint, its scheme and shape."""

    module: str
    tensor: str
    scheme: Scheme
    shape: tuple[int, int]

    @property
    def prefix(self) -> str:
        return self.tensor.removesuffix("weight")

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of all its output tensors."""
        return sum(map(spec_bytes, layout(self.scheme, *self.shape).values()))


@dataclass(frozen=True)
class Unit:
    """Tensors handled together: a block, or what stands outside of all blocks."""

    name: str
    tensors: tuple[str, ...]
    targets: dict[str, Target]  # by tensor


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a checkpoint."""

    checkpoint: Checkpoint
    recipe: Recipe
    units: tuple[Unit, ...]
    kept: tuple[str, ...]  # names of the linears left as they are
    names: dict[str, str]  # name of a tensor in the model -> in the checkpoint

    @property
    def targets(self) -> list[Target]:
        return [target for unit in self.units for target in unit.targets.values()]

    def outputs(self) -> dict[str, Spec]:
        """Name -> (dtype, shape) of every tensor of the output, in order."""
        return {name: spec for unit in self.units for name, spec in self.unit_outputs(unit).items()}

    def unit_outputs(self, unit: Unit) -> dict[str, Spec]:
        """The same of one unit."""
        tensors: dict[str, Spec] = {}
        for name in unit.tensors:
            target = unit.targets.get(name)
            if target is None:
                info = self.checkpoint.tensors[name]
                tensors[name] = (info.dtype, info.shape)
            else:
                parts = layout(target.scheme, *target.shape)
                tensors |= {target.prefix + part: spec for part, spec in parts.items()}
        return tensors

    @property
    def output_bytes(self) -> int:
        return sum(map(spec_bytes, self.outputs().values()))

    @property
    def input_bytes(self) -> int:
        return sum(info.bytes for info in self.checkpoint.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits of a quantized weight: codes, scales and zero points."""
        return 8 * sum(t.bytes for t in self.targets) / sum(t.elements for t in self.targets)

    @property
    def coverage(self) -> float:
        """Share of the blocks' weights (tensors of two and more dimensions) that is quantized."""
        infos = self.checkpoint.tensors
        weights = sum(
            infos[name].elements
            for unit in self.units
            if unit.name != OUTSIDE
            for name in unit.tensors
            if len(infos[name].shape) > 1
        )
        return sum(t.elements for t in self.targets) / weights if weights else 0.0


def make_plan(checkpoint: Checkpoint, model: nn.Module, recipe: Recipe) -> Plan:
    """`model` is the checkpoint's architecture, on the meta device.

    Raises AfpqError for a checkpoint that is quantized already, lacks a weight, or holds one of another shape or
    dtype than the model says, and where nothing is left to quantize.
    """
    done = checkpoint.config.get("quantization_config")
    if done:
        method = done.get("quant_method") if isinstance(done, dict) else done
        raise AfpqError(f"{checkpoint.directory}: already quantized ({str(method)[:80]}); give the original model")
    names = _tensor_names(checkpoint, model)
    linears = find_linears(model)
    absent = [name for name, _ in linears if f"{name}.weight" not in names]
    if absent and len(absent) < len(linears):
        raise AfpqError(
            f"{checkpoint.directory}: the checkpoint lacks {absent[0]}.weight ({len(absent)} linears in all)"
        )
    targets: dict[str, Target] = {}
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module, linear in linears:
        scheme, tensor = recipe.scheme_for(module), names.get(f"{module}.weight")
        if scheme is not None and tensor is not None:
            targets[tensor] = _target(checkpoint, module, linear, tensor, scheme)
            kept.discard(module)
    if not targets:
        raise AfpqError(f"{checkpoint.directory}: no linear layer left to quantize; see --skip")
    for tensor, target in targets.items():
        parts = (target.prefix + part for part in layout(target.scheme, *target.shape))
        taken = next((name for name in parts if name in checkpoint.tensors), None)
        if taken is not None:
            raise AfpqError(f"{checkpoint.directory}: tensor {taken} is in the way of {tensor}, quantized")
    return Plan(checkpoint, recipe, _units(checkpoint, model, names, targets), tuple(sorted(kept)), names)


def _target(checkpoint: Checkpoint, module: str, linear: nn.Linear, tensor: str, scheme: Scheme) -> Target:
    info, expected = checkpoint.tensors[tensor], (linear.out_features, linear.in_features)
    if info.shape != expected:
        raise AfpqError(f"{info.file}: tensor {tensor} has shape {info.shape}; the config says {expected}")
    if info.dtype not in FLOATS:
        raise AfpqError(f"{info.file}: tensor {tensor} is {info.dtype}; expected float32, bfloat16 or float16")
    return Target(module, tensor, scheme, expected)


def _tensor_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Name in the model -> name in the checkpoint; they may differ by the base model's prefix.

    A weight that the checkpoint lacks is an error, unless the checkpoint holds tensors the model does not know:
    then Transformers converts between the two while loading, and such weights are left as they are.
    """
    base = getattr(model, "base_model_prefix", "")
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = [name for name in model.state_dict() if name not in tied]

    located = {name: find_tensor(checkpoint.tensors, name, base) for name in wanted}
    found = {name: tensor for name, tensor in located.items() if tensor is not None}
    absent = set(wanted) - set(found)
    missing = [name for name, _ in model.named_parameters() if name in absent]
    if missing and len(found) == len(checkpoint.tensors):
        raise AfpqError(f"{checkpoint.directory}: the checkpoint lacks {missing[0]} ({len(missing)} tensors in all)")
    return found


def _units(
    checkpoint: Checkpoint, model: nn.Module, names: dict[str, str], targets: dict[str, Target]
) -> tuple[Unit, ...]:
    """Outside first, then the blocks in order; tensors the model does not know go by their names' prefix."""
    module_names = {tensor: name for name, tensor in names.items()}
    blocks = [block.name for block in find_blocks(model)]
    members: dict[str, list[str]] = {name: [] for name in (OUTSIDE, *blocks)}
    known = set(blocks)
    for tensor in checkpoint.tensors:
        path = module_names.get(tensor, tensor).split(".")
        parents = (".".join(path[:length]) for length in range(1, len(path)))
        members[next((parent for parent in parents if parent in known), OUTSIDE)].append(tensor)
    return tuple(
        Unit(name, tuple(tensors), {t: targets[t] for t in tensors if t in targets})
        for name, tensors in members.items()
        if tensors
    )
