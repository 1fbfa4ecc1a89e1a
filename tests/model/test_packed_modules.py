# SPDX-License-Identifier: MIT
"""Packed modules are put where matrices were: on the meta device, in their shapes, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gpt2, llama, model_of
from torch import nn
from transformers import AutoModelForCausalLM

from afpq import AfpqConfig, AfpqError, Recipe, parse_scheme
from afpq.model.blocks import conv1d_linears, find_blocks
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import find_embedding_and_head
from afpq.model.experts import AfpqExperts
from afpq.model.linear import AfpqLinear
from afpq.model.packed_modules import convertible, is_loading_slot, mark_initialized, pack_ends, pack_matrices
from afpq.model.renamed_tensors import TensorNames


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def test_a_head_to_pack_and_not_to_convert_is_an_error(tiny_model_dir: Path) -> None:
    config = AfpqConfig(lm_head="same", modules_to_not_convert=["lm_head"])
    with pytest.raises(AfpqError, match="lm_head"):
        load(tiny_model_dir, quantization_config=config)


SCHEME = parse_scheme("nf3-asym-g32")


def swapped(model: Any, packed: bool = True, skip: str = "nothing") -> Any:
    """The model with packed modules in place of the matrices of its blocks, but for names that hold `skip`."""
    places = {block.name for block in find_blocks(model)}
    leaves = TensorNames(model).leaves()
    pack_matrices(model, places, lambda name: None if skip in name else SCHEME, leaves, packed)
    return model


def packed_in(model: nn.Module) -> dict[str, AfpqLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AfpqLinear)}


def test_linears_of_the_blocks_are_replaced_in_their_shapes_and_nothing_else() -> None:
    model = llama(False)
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = packed_in(swapped(model, skip="k_proj"))
    assert set(shapes) - set(found) == {"lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in (0, 1))}
    assert all((layer.out_features, layer.in_features) == shapes[name] for name, layer in found.items())
    assert all(tensor.is_meta for layer in found.values() for tensor in layer.state_dict().values())
    assert not any(name == "weight" for layer in found.values() for name, _ in layer.named_parameters())


def test_a_conv1d_becomes_a_layer_of_its_outputs_by_inputs() -> None:
    model = gpt2(True)
    shapes = {name: (conv.weight.shape[1], conv.weight.shape[0]) for name, conv in conv1d_linears(model)}
    found = packed_in(swapped(model))
    assert {name: (layer.rows, layer.columns) for name, layer in found.items()} == shapes
    assert all(layer.conv1d and layer.bias is not None for layer in found.values())
    assert all(layer.weight.shape == (layer.columns, layer.rows) for layer in found.values())  # as its readers know it


def test_experts_are_taken_apart_all_or_none() -> None:
    model = swapped(model_of("mixtral"))
    experts = {name: module for name, module in model.named_modules() if isinstance(module, AfpqExperts)}
    inside = [name for name in packed_in(model) if name.startswith(tuple(f"{place}." for place in experts))]
    assert len(experts) == 2 and len(inside) == 2 * 3 * next(iter(experts.values())).form.experts
    model = swapped(model_of("mixtral"), skip="experts")
    assert not any(isinstance(module, AfpqExperts) for module in model.modules()) and packed_in(model)
    with pytest.raises(AfpqError, match=r"mlp\.experts: "):
        swapped(model_of("mixtral"), skip="w2")


@pytest.mark.parametrize("make", [lambda: llama(False), lambda: gpt2(True), lambda: model_of("mixtral")])
def test_weights_still_to_be_quantized_keep_their_places(make: Any) -> None:
    """What a checkpoint of floats is loaded to has its names and shapes; each such place is reported as waiting."""
    model = make()
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    swapped(model, packed=False)
    after = dict(model.named_parameters())
    assert {name: parameter.shape for name, parameter in after.items()} == before
    places = {name: name.rpartition(".") for name in before}
    waiting = {n for n, (m, _, p) in places.items() if is_loading_slot(model.get_submodule(m), p)}
    matrices = {name for name, p in after.items() if p.ndim > 1 and ".0." in name and "gate.weight" not in name}
    assert matrices <= waiting and not any("norm" in name or "ln_" in name for name in waiting)


@pytest.mark.parametrize("tied", [True, False])
def test_ends_are_replaced_by_what_can_look_up_and_make_logits(tied: bool) -> None:
    model = llama(tied)
    ends = find_embedding_and_head(model)
    recipe = Recipe(SCHEME, lm_head=SCHEME, embedding=SCHEME)
    pack_ends(model, ends, recipe, [], packed=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, AfpqEmbedding) and isinstance(head, AfpqLinear)
    assert isinstance(head, AfpqTiedHead) is tied and (tied or not head.readable)
    assert (table.rows, table.columns, head.out_features, head.in_features) == (256, 64, 256, 64)
    assert not any("lm_head" in name for pair in (model.all_tied_weights_keys or {}).items() for name in pair)


def test_a_module_that_only_holds_packed_ones_needs_no_initialization() -> None:
    model = swapped(llama(False))
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    mark_initialized(model)
    marked = {name for name, module in model.named_modules() if getattr(module, "_is_hf_initialized", False)}
    assert marked == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")}


def test_convertible_is_every_matrix_wherever_it_stands() -> None:
    names = {name for name, _ in convertible(model_of("mixtral"))}
    assert {"lm_head", "model.layers.0.mlp.experts", "model.layers.1.self_attn.o_proj"} <= names
    assert len([name for name, _ in convertible(gpt2(True))]) == 2 * 4 + 1
