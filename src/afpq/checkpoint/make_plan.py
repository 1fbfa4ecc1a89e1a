# SPDX-License-Identifier: MIT
"""Make the plan: match the model's linears with the checkpoint's tensors, by the recipe."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.low_precision import refuse_quantized
from afpq.checkpoint.plan import HEAD, OUTSIDE, KeptPart, Plan, PlanUnit, Target
from afpq.checkpoint.reader import FLOATS, Checkpoint
from afpq.checkpoint.wrappers import hint, unwrap
from afpq.errors import AfpqError, in_all
from afpq.model.blocks import TransposedLinear, find_blocks, find_linears, is_linear, left_in_blocks, left_linears
from afpq.model.embedding_and_head import EmbeddingAndHead, settle_recipe
from afpq.model.experts import AfpqExperts, all_or_none, find_experts
from afpq.model.patterns import check_patterns
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import layout
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


def make_plan(checkpoint: Checkpoint, model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Plan the quantization of a checkpoint; `model` is its architecture, on the meta device.

    Raises AfpqError for a checkpoint that is quantized already, lacks a weight, or holds one of another shape or dtype
    than the model's, and if nothing is left to quantize.
    """
    refuse_quantized(checkpoint.directory, checkpoint.config)
    checkpoint, wrapper = unwrap(checkpoint, model)
    located, experts = TensorLookup(checkpoint.tensors, model, model.state_dict()), find_experts(model)
    names = _tensor_names(checkpoint, model, located, experts)
    linears = find_linears(model)
    absent = [name for name, _ in linears if f"{name}.weight" not in names]
    if absent:
        raise AfpqError(
            f"{checkpoint.directory}: the checkpoint lacks {absent[0]}.weight{in_all(len(absent), 'linear')}"
            f"{hint(checkpoint, wrapper)}"
        )
    check_patterns(recipe, [name for name, _ in linears], model.state_dict())
    recipe, ends = settle_recipe(model, recipe, located.hold_different_values)
    left = _left_experts(experts, recipe)
    routed = tuple(f"{name}." for name in experts)
    targets: list[Target] = []
    kept = {name for name, module in model.named_modules() if is_linear(module)} | left_linears(model).keys()
    for module, linear in linears:
        scheme, source = recipe.scheme_for(module), names.get(f"{module}.weight")
        if scheme is not None and source is not None:
            target = _target(checkpoint, module, linear, source, scheme)
            targets.append(replace(target, expert=module.startswith(routed)))
            kept.discard(module)
    ends_found, head = _end_targets(checkpoint, model, located, ends, recipe)
    targets += ends_found
    kept -= ends.schemes(recipe).keys()
    reasons = left_in_blocks(model)
    if not targets and (linears or not reasons):
        why = "left to quantize; see --skip" if recipe.skip else f"in blocks of {type(model).__name__}"
        raise AfpqError(f"{checkpoint.directory}: no linear layer {why}")
    _check_names(checkpoint, targets)
    kept = {next((e for e in left if name.startswith(f"{e}.")), name) for name in kept}
    units = _units(checkpoint, model, names, targets, head)
    unused = _unused(checkpoint, model, located, names)
    return Plan(checkpoint, recipe, units, tuple(sorted(kept)), names, ends, unused, wrapper, reasons)


def _unused(
    checkpoint: Checkpoint, model: PreTrainedModel, located: TensorLookup, names: dict[str, TensorPart]
) -> tuple[str, ...]:
    """Return the tensors that the architecture does not have.

    None if a parameter has no tensor: then Transformers makes some from tensors of other names while loading.
    """
    state = model.state_dict()
    known = {part.tensor for part in names.values()} | {located.find(name) for name in state}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if any(name not in names and name not in tied for name, _ in model.named_parameters()):
        return ()
    return tuple(name for name in checkpoint.tensors if name not in known)


def _check_names(checkpoint: Checkpoint, targets: list[Target]) -> None:
    for target in targets:
        parts = (target.prefix + part for part in layout(target.scheme, *target.shape))
        taken = next((name for name in parts if name in checkpoint.tensors), None)
        if taken is not None:
            raise AfpqError(f"{checkpoint.directory}: tensor {taken} is in the way of {target.tensor}, quantized")


def _left_experts(experts: dict[str, AfpqExperts], recipe: Recipe) -> list[str]:
    """Return the modules of experts that are not quantized; each is named as one, since it is loaded as one."""

    def chosen(name: str) -> list[bool]:
        return [recipe.scheme_for(f"{name}.{linear}") is not None for linear in experts[name].form.linears()]

    return [name for name in experts if not all_or_none(name, chosen(name))]


def _target(checkpoint: Checkpoint, module: str, layer: nn.Module, source: TensorPart, scheme: Scheme) -> Target:
    rows, columns = layer.get_parameter("weight").shape
    info, expected = checkpoint.tensors[source.tensor], (rows, columns)
    try:
        shape = tuple(source.of(torch.empty(info.shape, device="meta")).shape)
    except IndexError:
        shape = info.shape
    if shape != expected:
        raise AfpqError(f"{info.file}: tensor {source.tensor} has shape {info.shape}; the config says {expected}")
    if info.dtype not in FLOATS:
        raise AfpqError(f"{info.file}: tensor {source.tensor} is {info.dtype}; expected float32, bfloat16 or float16")
    return Target(module, source, scheme, expected, _prefix(module, source))


def _prefix(module: str, source: TensorPart) -> str:
    """Return the prefix of a module's output tensors: the checkpoint's, but experts get their own names."""
    parent = source.tensor.rpartition(".")[0]
    return f"{parent}." if source.whole else f"{parent}.{'.'.join(module.split('.')[-2:])}."


def _end_targets(
    checkpoint: Checkpoint, model: nn.Module, located: TensorLookup, ends: EmbeddingAndHead, recipe: Recipe
) -> tuple[list[Target], str | None]:
    """Return (the ends to be quantized, the head's tensor, which may repeat a tied embedding's)."""
    targets: list[Target] = []
    head = None
    for module, scheme in ends.schemes(recipe).items():
        tensor = located.find(f"{module}.weight")
        head = tensor if module == ends.head else head
        if ends.tied and module == ends.head:
            continue
        if tensor is None:
            raise AfpqError(
                f"{checkpoint.directory}: {module}.weight is not stored under this name; it cannot be quantized"
            )
        targets.append(_target(checkpoint, module, model.get_submodule(module), TensorPart(tensor), scheme))
    return targets, head


def _tensor_names(
    checkpoint: Checkpoint, model: PreTrainedModel, located: TensorLookup, experts: dict[str, AfpqExperts]
) -> dict[str, TensorPart]:
    """Map names in the model to places in the checkpoint.

    A weight that the checkpoint lacks is an error, unless the checkpoint holds tensors that the model lacks: then
    Transformers converts between the two while loading, and such weights are left as they are.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = [name for name in model.state_dict() if name not in tied]
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, TransposedLinear)}
    found = {
        name: TensorPart(tensor, transposed=name in turned)
        for name in wanted
        if (tensor := located.find(name)) is not None
    }
    for place, module in experts.items():
        found = _fused_names(place, module, located) | found
    absent = set(wanted) - set(found)
    missing = [name for name, _ in model.named_parameters() if name in absent]
    if missing and len({source.tensor for source in found.values()}) == len(checkpoint.tensors):
        raise AfpqError(f"{checkpoint.directory}: the checkpoint lacks {missing[0]}{in_all(len(missing), 'tensor')}")
    return found


def _fused_names(place: str, experts: AfpqExperts, located: TensorLookup) -> dict[str, TensorPart]:
    """Map the experts' weights and biases to places, if the checkpoint holds all of a layer in one tensor."""
    found = {}
    for linear, kind, source in experts.form.parts():
        fused = located.find(f"{place}.{source.tensor}")
        if fused is not None:
            found[f"{place}.{linear}.{kind}"] = replace(source, tensor=fused)
    return found


def _units(
    checkpoint: Checkpoint, model: nn.Module, names: dict[str, TensorPart], targets: list[Target], head: str | None
) -> tuple[PlanUnit, ...]:
    """Group the tensors: outside first, then the blocks in order; tensors that the model lacks go by their prefix.

    `head` is the tensor of a head to be quantized: the last unit, or dropped if it repeats a tied embedding.
    """
    module_names = {source.tensor: name for name, source in names.items()}
    blocks = [block.name for block in find_blocks(model)]
    members: dict[str, list[str]] = {name: [] for name in (OUTSIDE, *blocks)}
    known = set(blocks)
    members[HEAD] = [target.source.tensor for target in targets if target.source.tensor == head]
    for tensor in checkpoint.tensors:
        if tensor == head:
            continue
        path = module_names.get(tensor, tensor).split(".")
        parents = (".".join(path[:length]) for length in range(1, len(path)))
        members[next((parent for parent in parents if parent in known), OUTSIDE)].append(tensor)
    replaced = _replaced(checkpoint, names, targets)
    return tuple(
        PlanUnit(name, tuple(tensors), {t: replaced[t] for t in tensors if t in replaced})
        for name, tensors in members.items()
        if tensors
    )


def _replaced(
    checkpoint: Checkpoint, names: dict[str, TensorPart], targets: list[Target]
) -> dict[str, tuple[Target | KeptPart, ...]]:
    """Map each tensor that is not kept as it is to its replacements."""
    parts: dict[str, list[Target | KeptPart]] = {}
    for target in targets:
        parts.setdefault(target.source.tensor, []).append(target)
        name = f"{target.module}.bias"
        bias = names.get(name)
        if bias is not None and not bias.whole:
            info = checkpoint.tensors[bias.tensor]
            piece = KeptPart(name, bias, f"{target.prefix}bias", (info.dtype, target.shape[:1]))
            parts.setdefault(bias.tensor, []).append(piece)
    for tensor, members in parts.items():
        info = checkpoint.tensors[tensor]
        covered = sum(m.elements if isinstance(m, Target) else m.spec[1][0] for m in members)
        if covered != info.elements:
            raise AfpqError(f"{info.file}: tensor {tensor} has shape {info.shape}; the config says {covered} elements")
    return {tensor: tuple(members) for tensor, members in parts.items()}
