# SPDX-License-Identifier: MIT
"""Blocks are found by walking the model, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from afpq.model.blocks import find_blocks, find_linears, replace_module, replaced_forwards


class Layer(nn.Module):
    """A block of two linears, one of them deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU())


class Expert(nn.Module):
    """A block that holds a list of linears itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Model(nn.Module):
    """Embeddings, a list without linears, a stack of blocks, and a head that is no block."""

    def __init__(self, layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(3, 4)
        self.projection = nn.Linear(4, 4)
        self.model = nn.Module()
        self.model.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.model.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(4, 3)


def test_blocks_are_the_members_of_lists_that_hold_linears() -> None:
    model = Model()
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block.module is model.get_submodule(block.name) for block in blocks)


def test_linears_have_their_full_names_in_order() -> None:
    model = Model()
    found = find_linears(model)
    parts = ("attention", "mlp.0")
    assert [name for name, _ in found] == [f"model.layers.{i}.{part}" for i in (0, 1) for part in parts]
    assert all(module is model.get_submodule(name) for name, module in found)
    assert list(find_blocks(model)[1].linears()) == found[2:]


def test_a_nested_list_belongs_to_the_outermost() -> None:
    model = Model(Expert)
    assert [block.name for block in find_blocks(model)] == ["model.layers.0", "model.layers.1"]
    names = [name for name, _ in find_linears(model)]
    assert names[:3] == [f"model.layers.0.{part}" for part in ("gate", "experts.0", "experts.1")]


def test_a_list_of_lists_is_one_list() -> None:
    model = nn.Module()
    model.towers = nn.ModuleList([nn.ModuleList([Layer()]), nn.ModuleList([Layer(), Layer()])])
    assert [block.name for block in find_blocks(model)] == ["towers.0", "towers.1"]
    assert len(find_linears(model)) == 6


def test_several_stacks_are_all_found_in_order() -> None:
    model = nn.Module()
    model.encoder, model.decoder = Model(), Model(Expert)
    names = [block.name for block in find_blocks(model)]
    assert names == [f"{half}.model.layers.{i}" for half in ("encoder", "decoder") for i in (0, 1)]


def test_a_list_of_plain_linears_is_a_stack_of_linears() -> None:
    model = nn.Module()
    model.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert [name for name, _ in find_linears(model)] == ["heads.0", "heads.1"]


@pytest.mark.parametrize(
    "model",
    [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ModuleDict({"layers": nn.ModuleList([nn.ReLU()])})],
    ids=["linear", "sequential", "list without linears"],
)
def test_without_a_stack_there_are_no_blocks(model: nn.Module) -> None:
    assert find_blocks(model) == [] and find_linears(model) == []


@pytest.mark.parametrize("name", ["head", "model.layers.1.attention", "model.layers.0.mlp.0", "model.layers.1"])
def test_replacing_puts_a_module_in_the_place_of_another(name: str) -> None:
    model, new = Model(), nn.Identity()
    others = {other: module for other, module in model.named_modules() if not f"{other}.".startswith(f"{name}.")}
    replace_module(model, name, new)
    assert model.get_submodule(name) is new
    assert {other: module for other, module in model.named_modules() if other != name} == others


def test_a_replaced_module_is_used() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    replace_module(model, "0", nn.Identity())
    replace_module(model, "1.0", nn.Identity())
    assert torch.equal(model(torch.ones(4)), torch.ones(4))


def test_forwards_are_replaced_for_a_while() -> None:
    """A forward of the instance, as accelerate's hooks leave one, comes back; so does the class's."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    layers[1].forward = own = lambda x: x + 1

    def make(factor: int, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: factor * layer.get_parameter("bias")

    x = torch.ones(4)
    with replaced_forwards([(2, layers[0]), (3, layers[1])], make):
        assert torch.equal(layers[0](x), 2 * layers[0].bias) and torch.equal(layers[1](x), 3 * layers[1].bias)
    assert "forward" not in vars(layers[0]) and layers[1].forward is own


def test_forwards_come_back_after_an_error_half_way() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

    def make(key: int, _layer: nn.Module) -> Callable[[Tensor], Tensor]:
        if key == 1:
            raise ValueError("half way")
        return lambda x: x

    with pytest.raises(ValueError, match="half way"), replaced_forwards(list(enumerate(layers)), make):
        pass
    assert all("forward" not in vars(layer) for layer in layers)
