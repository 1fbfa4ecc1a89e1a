# SPDX-License-Identifier: MIT
"""Replace a model's matrices by packed modules, before its weights are loaded.

Linears, Conv1D and fused experts become AfpqLinear, the ends of the model AfpqEmbedding and a head, all on the meta
device; if weights are still to be quantized, the float parameters stay as loading slots.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch import nn
from transformers import PreTrainedModel

from afpq.errors import AfpqError
from afpq.model.blocks import conv1d_linears, in_blocks, is_linear, replace_module
from afpq.model.embedding import AfpqEmbedding
from afpq.model.embedding_and_head import EmbeddingAndHead
from afpq.model.experts import AfpqExperts, all_or_none, expert_form, split_experts
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.model.replace_ends import replace_ends
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe, is_kept

SchemeOf = Callable[[str], Scheme | None]


def convertible(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every linear, Conv1D and module of fused experts that can be replaced, by name."""
    convs = {name for name, _ in conv1d_linears(model)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module) or name in convs or expert_form(module) is not None
    ]


def linear_names(model: nn.Module, blocks: Container[str]) -> list[str]:
    """Return the names of the linears that `pack_matrices` asks for the scheme of, each expert's too."""
    names: list[str] = []
    for name, module in convertible(model):
        if in_blocks(name, blocks):
            form = expert_form(module)
            names += [name] if form is None else [f"{name}.{linear}" for linear in form.linears()]
    return names


def pack_matrices(
    model: nn.Module, blocks: Container[str] | None, scheme_of: SchemeOf, leaves: tuple[str, ...], packed: bool
) -> None:
    """Replace the convertible modules in the blocks called `blocks` (None: anywhere) that have a scheme by `scheme_of`.

    `leaves`: names of an expert's linears (`TensorNames.leaves`). `packed`: whether the checkpoint holds codes; if not,
    float parameters are kept to be loaded. Raises AfpqError if only some of a layer's experts would be quantized.
    """
    for name, module in convertible(model):
        if blocks is not None and not in_blocks(name, blocks):
            continue
        form = expert_form(module, leaves)
        if form is None:
            scheme = scheme_of(name)
            if scheme is not None:
                layer = _empty_layer(module, scheme)
                if not packed:
                    layer.register_parameter("weight", module.get_parameter("weight"))
                replace_module(model, name, layer)
            continue
        schemes = [scheme_of(f"{name}.{linear}") for linear in form.linears()]
        if all_or_none(name, [scheme is not None for scheme in schemes]):
            split = split_experts(module, form)
            for linear, scheme in zip(form.linears(), schemes):
                assert scheme is not None
                replace_module(split, linear, _empty_layer(split.get_submodule(linear), scheme))
            if not packed:
                for parameter, value in module.named_parameters():
                    split.register_parameter(parameter, value)
            replace_module(model, name, split)


def _empty_layer(module: nn.Module, scheme: Scheme) -> AfpqLinear:
    """Make an AfpqLinear on the meta device with the shape of a linear or Conv1D."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None) is not None
    conv1d = not isinstance(module, nn.Linear)
    in_features, out_features = weight.shape if conv1d else reversed(weight.shape)
    layer = AfpqLinear(in_features, out_features, scheme, bias, "meta", weight.dtype)
    layer.conv1d = conv1d
    return layer


def pack_ends(
    model: PreTrainedModel, ends: EmbeddingAndHead, recipe: Recipe, kept: Sequence[str], packed: bool
) -> None:
    """Replace the embedding and the head by empty packed modules, if the recipe has schemes for them.

    Raises AfpqError for one that is also among the modules to be kept.
    """
    schemes = ends.schemes(recipe)
    clash = next((name for name in schemes if is_kept(name, kept)), None)
    if clash is not None:
        raise AfpqError(f"{clash}: has a scheme, and is in modules_to_not_convert; drop one of the two")

    def empty_end(_name: str, module: nn.Module, scheme: Scheme) -> AfpqEmbedding | AfpqLinear:
        weight = module.get_parameter("weight")  # before the embedding drops it
        new = (
            AfpqEmbedding(module, scheme, "meta") if isinstance(module, nn.Embedding) else _empty_layer(module, scheme)
        )
        if not packed:
            new.register_parameter("weight", weight)
        return new

    replace_ends(model, ends, schemes, empty_end)


def mark_initialized(model: nn.Module) -> None:
    """Mark modules that hold a quantized linear, and have no tensors of their own, as initialized.

    Some models initialize their linears' weights from the module above (GPT-2's c_proj); ours have none.
    """
    for module in model.modules():
        if any(isinstance(child, AfpqLinear) for child in module.children()):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not own:
                module._is_hf_initialized = True  # type: ignore[assignment]


def is_loading_slot(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter is only a loading slot."""
    return isinstance(module, AfpqExperts) or (isinstance(module, PackedModule) and parameter == "weight")
