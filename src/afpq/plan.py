# SPDX-License-Identifier: MIT
"""Decide everything before a weight is read: which tensor is quantized how, and what the output will hold.

The plan comes from headers alone. It knows the name, dtype and shape of every output tensor, so the writer can lay
the files out beforehand, and sizes can be told without a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from afpq.blocks import TransposedLinear, find_blocks, find_linears
from afpq.ends import NO_ENDS, Ends, settle_recipe
from afpq.errors import AfpqError
from afpq.experts import BIAS, AfpqExperts, all_or_none
from afpq.names import Located
from afpq.packing import Spec, layout, spec_bytes
from afpq.scheme import Recipe, Scheme
from afpq.source import Checkpoint, Stored

OUTSIDE = "outside the blocks"
HEAD = "the output head"  # a unit of its own where it is quantized: last, since what it reads is known last
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """A linear to quantize: the module's name, where its weight is stored, its scheme and shape.

    `prefix` begins the names of its output tensors. `expert`: whether only some tokens reach it.
    """

    module: str
    stored: Stored
    scheme: Scheme
    shape: tuple[int, int]
    prefix: str
    expert: bool = False

    @property
    def tensor(self) -> str:
        """The weight's name in the output's terms; also the checkpoint's, unless that holds all experts in one."""
        return f"{self.prefix}weight"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of all its output tensors."""
        return sum(map(spec_bytes, layout(self.scheme, *self.shape).values()))


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is kept under a name of its own, such as an expert's bias; `name` is the model's."""

    name: str
    stored: Stored
    output: str
    spec: Spec


@dataclass(frozen=True)
class Unit:
    """Tensors handled together: a block, what stands outside of all blocks, or the head.

    `replaced` tells what takes the place of a tensor of the checkpoint; tensors not in it are kept as they are.
    """

    name: str
    tensors: tuple[str, ...]
    replaced: dict[str, tuple[Target | Piece, ...]]

    @property
    def targets(self) -> list[Target]:
        return [part for parts in self.replaced.values() for part in parts if isinstance(part, Target)]

    @property
    def pieces(self) -> list[Piece]:
        return [part for parts in self.replaced.values() for part in parts if isinstance(part, Piece)]

    @property
    def in_blocks(self) -> bool:
        return self.name not in (OUTSIDE, HEAD)


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a checkpoint; of a tied head and embedding, the recipe has one scheme for both."""

    checkpoint: Checkpoint
    recipe: Recipe
    units: tuple[Unit, ...]
    kept: tuple[str, ...]  # names of the linears left as they are
    names: dict[str, Stored]  # name of a tensor in the model -> where it is in the checkpoint
    ends: Ends = NO_ENDS

    @property
    def targets(self) -> list[Target]:
        return [target for unit in self.units for target in unit.targets]

    @property
    def block_targets(self) -> list[Target]:
        """Those inside the blocks."""
        return [target for unit in self.units if unit.in_blocks for target in unit.targets]

    @property
    def end_targets(self) -> list[Target]:
        """The embedding and the head, where they are quantized; one for both where they are tied."""
        return [target for unit in self.units if not unit.in_blocks for target in unit.targets]

    def end_words(self, target: Target) -> str:
        """An end's name, and the other's where they are one."""
        return f"{target.module} (and {self.ends.head}, tied to it)" if self.ends.tied else target.module

    def outputs(self) -> dict[str, Spec]:
        """Name -> (dtype, shape) of every tensor of the output, in order."""
        return {name: spec for unit in self.units for name, spec in self.unit_outputs(unit).items()}

    def unit_outputs(self, unit: Unit) -> dict[str, Spec]:
        """The same of one unit."""
        tensors: dict[str, Spec] = {}
        for name in unit.tensors:
            if name not in unit.replaced:
                info = self.checkpoint.tensors[name]
                tensors[name] = (info.dtype, info.shape)
            for part in unit.replaced.get(name, ()):
                if isinstance(part, Piece):
                    tensors[part.output] = part.spec
                else:
                    specs = layout(part.scheme, *part.shape)
                    tensors |= {part.prefix + leaf: spec for leaf, spec in specs.items()}
        return tensors

    @property
    def output_bytes(self) -> int:
        return sum(map(spec_bytes, self.outputs().values()))

    @property
    def input_bytes(self) -> int:
        return sum(info.bytes for info in self.checkpoint.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits of a quantized weight of the blocks, or of the ends where there is no other."""
        targets = self.block_targets or self.targets
        return 8 * sum(t.bytes for t in targets) / sum(t.elements for t in targets)

    @property
    def file_bits_per_weight(self) -> float:
        """Bits of everything that is saved, over the weights of the original."""
        return 8 * self.output_bytes / sum(info.elements for info in self.checkpoint.tensors.values())

    @property
    def coverage(self) -> float:
        """Share of the blocks' weights (tensors of two and more dimensions) that is quantized."""
        quantized = sum(target.elements for target in self.block_targets)
        return quantized / (quantized + sum(self.left.values()) or 1)

    @property
    def left(self) -> dict[str, int]:
        """The blocks' weights that stay as they are: name of the output's tensor -> how many they are."""
        parts = {target.prefix + part for target in self.targets for part in layout(target.scheme, *target.shape)}
        return {
            name: torch.Size(shape).numel()
            for unit in self.units
            if unit.in_blocks
            for name, (_, shape) in self.unit_outputs(unit).items()
            if len(shape) > 1 and name not in parts
        }


def make_plan(checkpoint: Checkpoint, model: PreTrainedModel, recipe: Recipe) -> Plan:
    """`model` is the checkpoint's architecture, on the meta device.

    Raises AfpqError for a checkpoint that is quantized already, lacks a weight, or holds one of another shape or
    dtype than the model says, and where nothing is left to quantize.
    """
    done = checkpoint.config.get("quantization_config")
    if done:
        method = done.get("quant_method") if isinstance(done, dict) else done
        hint = ", or keep these weights with afpq import" if method == "bitsandbytes" else ""
        raise AfpqError(
            f"{checkpoint.directory}: already quantized ({str(method)[:80]}); give the original model{hint}"
        )
    names = _tensor_names(checkpoint, model)
    recipe, ends = settle_recipe(model, recipe, Located(checkpoint.tensors, model).differ)
    linears = find_linears(model)
    absent = [name for name, _ in linears if f"{name}.weight" not in names]
    if absent and len(absent) < len(linears):
        raise AfpqError(
            f"{checkpoint.directory}: the checkpoint lacks {absent[0]}.weight ({len(absent)} linears in all)"
        )
    left = _left_experts(model, recipe)
    targets: list[Target] = []
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module, linear in linears:
        scheme, stored = recipe.scheme_for(module), names.get(f"{module}.weight")
        if scheme is not None and stored is not None:
            targets.append(_target(checkpoint, module, linear, stored, scheme))
            kept.discard(module)
    ends_found, head = _end_targets(checkpoint, model, ends, recipe)
    targets += ends_found
    kept -= ends.schemes(recipe).keys()
    if not targets:
        raise AfpqError(f"{checkpoint.directory}: no linear layer left to quantize; see --skip")
    _check_names(checkpoint, targets)
    kept = {next((e for e in left if name.startswith(f"{e}.")), name) for name in kept}
    units = _units(checkpoint, model, names, targets, head)
    return Plan(checkpoint, recipe, units, tuple(sorted(kept)), names, ends)


def _check_names(checkpoint: Checkpoint, targets: list[Target]) -> None:
    for target in targets:
        parts = (target.prefix + part for part in layout(target.scheme, *target.shape))
        taken = next((name for name in parts if name in checkpoint.tensors), None)
        if taken is not None:
            raise AfpqError(f"{checkpoint.directory}: tensor {taken} is in the way of {target.tensor}, quantized")


def _left_experts(model: nn.Module, recipe: Recipe) -> list[str]:
    """Modules of experts that are not quantized: they are named in one, since they will be loaded in one."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, AfpqExperts)}
    chosen = {name: [recipe.scheme_for(f"{name}.{leaf}") for leaf, _ in e.linears()] for name, e in experts.items()}
    return [name for name, schemes in chosen.items() if not all_or_none(name, [s is not None for s in schemes])]


def _target(checkpoint: Checkpoint, module: str, layer: nn.Module, stored: Stored, scheme: Scheme) -> Target:
    rows, columns = layer.get_parameter("weight").shape
    info, expected = checkpoint.tensors[stored.tensor], (rows, columns)
    try:
        shape = tuple(stored.of(torch.empty(info.shape, device="meta")).shape)
    except IndexError:
        shape = info.shape
    if shape != expected:
        raise AfpqError(f"{info.file}: tensor {stored.tensor} has shape {info.shape}; the config says {expected}")
    if info.dtype not in FLOATS:
        raise AfpqError(f"{info.file}: tensor {stored.tensor} is {info.dtype}; expected float32, bfloat16 or float16")
    return Target(module, stored, scheme, expected, _prefix(module, stored), stored.expert is not None)


def _prefix(module: str, stored: Stored) -> str:
    """What a module's tensors are called in the output: as in the checkpoint, but experts get names of their own."""
    parent = stored.tensor.rpartition(".")[0]
    return f"{parent}." if stored.whole else f"{parent}.{'.'.join(module.split('.')[-2:])}."


def _end_targets(
    checkpoint: Checkpoint, model: nn.Module, ends: Ends, recipe: Recipe
) -> tuple[list[Target], str | None]:
    """(the ends to be quantized, the tensor of the head among them, which may repeat a tied embedding's)."""
    targets: list[Target] = []
    located, head = Located(checkpoint.tensors, model), None
    for module, scheme in ends.schemes(recipe).items():
        tensor = located.find(f"{module}.weight")
        head = tensor if module == ends.head else head
        if ends.tied and module == ends.head:
            continue
        if tensor is None:
            raise AfpqError(
                f"{checkpoint.directory}: {module}.weight is not stored under this name; it cannot be quantized"
            )
        targets.append(_target(checkpoint, module, model.get_submodule(module), Stored(tensor), scheme))
    return targets, head


def _tensor_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Stored]:
    """Name in the model -> where it is in the checkpoint.

    A weight that the checkpoint lacks is an error, unless the checkpoint holds tensors the model does not know:
    then Transformers converts between the two while loading, and such weights are left as they are.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = [name for name in model.state_dict() if name not in tied]
    located = Located(checkpoint.tensors, model, wanted)
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TransposedLinear)}
    found = {
        name: Stored(tensor, transposed=name in turned) for name in wanted if (tensor := located.find(name)) is not None
    }
    for place, module in model.named_modules():
        if isinstance(module, AfpqExperts):
            found = _fused_names(place, module, located) | found
    absent = set(wanted) - set(found)
    missing = [name for name, _ in model.named_parameters() if name in absent]
    if missing and len({stored.tensor for stored in found.values()}) == len(checkpoint.tensors):
        raise AfpqError(f"{checkpoint.directory}: the checkpoint lacks {missing[0]} ({len(missing)} tensors in all)")
    return found


def _fused_names(place: str, experts: AfpqExperts, located: Located) -> dict[str, Stored]:
    """Where the weights and biases of experts are, if the checkpoint holds all of a layer in one tensor."""
    form, found = experts.form, {}
    for name, leaf in experts.linears():
        for kind, suffix in (("weight", ""), ("bias", BIAS)):
            fused = located.find(f"{place}.{form.parameter(leaf)}{suffix}")
            if fused is not None:
                found[f"{place}.{name}.{kind}"] = form.stored(leaf, fused, int(name.partition(".")[0]))
    return found


def _units(
    checkpoint: Checkpoint, model: nn.Module, names: dict[str, Stored], targets: list[Target], head: str | None
) -> tuple[Unit, ...]:
    """Outside first, then the blocks in order; tensors the model does not know go by their names' prefix.

    `head` is the tensor of a head to be quantized: the last unit, or dropped where it repeats a tied embedding.
    """
    module_names = {stored.tensor: name for name, stored in names.items()}
    blocks = [block.name for block in find_blocks(model)]
    members: dict[str, list[str]] = {name: [] for name in (OUTSIDE, *blocks)}
    known = set(blocks)
    members[HEAD] = [target.stored.tensor for target in targets if target.stored.tensor == head]
    for tensor in checkpoint.tensors:
        if tensor == head:
            continue
        path = module_names.get(tensor, tensor).split(".")
        parents = (".".join(path[:length]) for length in range(1, len(path)))
        members[next((parent for parent in parents if parent in known), OUTSIDE)].append(tensor)
    replaced = _replaced(checkpoint, names, targets)
    return tuple(
        Unit(name, tuple(tensors), {t: replaced[t] for t in tensors if t in replaced})
        for name, tensors in members.items()
        if tensors
    )


def _replaced(
    checkpoint: Checkpoint, names: dict[str, Stored], targets: list[Target]
) -> dict[str, tuple[Target | Piece, ...]]:
    """What takes the place of each tensor that is not kept as it is."""
    parts: dict[str, list[Target | Piece]] = {}
    for target in targets:
        parts.setdefault(target.stored.tensor, []).append(target)
        name = f"{target.module}.bias"
        bias = names.get(name)
        if bias is not None and not bias.whole:
            info = checkpoint.tensors[bias.tensor]
            piece = Piece(name, bias, f"{target.prefix}bias", (info.dtype, target.shape[:1]))
            parts.setdefault(bias.tensor, []).append(piece)
    for tensor, members in parts.items():
        info = checkpoint.tensors[tensor]
        covered = sum(m.elements if isinstance(m, Target) else m.spec[1][0] for m in members)
        if covered != info.elements:
            raise AfpqError(f"{info.file}: tensor {tensor} has shape {info.shape}; the config says {covered} elements")
    return {tensor: tuple(members) for tensor, members in parts.items()}
