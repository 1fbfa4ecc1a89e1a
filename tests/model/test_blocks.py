# SPDX-License-Identifier: MIT
"""Blocks are found by walking the model, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from afpq.model.blocks import (
    HARMLESS,
    TransposedLinear,
    conv1d_linears,
    find_blocks,
    find_linears,
    in_blocks,
    is_linear,
    left_linears,
    replace_module,
    replaced_forwards,
    why_left,
)


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


# ---- which linears can be replaced


class Plain(nn.Linear):
    """A subclass without a forward of its own, as torch has several."""


class Scaled(nn.Linear):
    """A linear that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Called(nn.Linear):
    """A linear that does more around its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1  # type: ignore[no-any-return]


class OddConv1D(Conv1D):
    """A transposed linear that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1  # type: ignore[no-any-return]


def patched(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _module, _inputs, output: output + 1)
    return layer


def on_a_device(layer: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())  # type: ignore[no-any-return]


LEFT: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear": (lambda: nn.Linear(3, 4), None),
    "transposed linear": (lambda: TransposedLinear(3, 4), None),
    "subclass without forward": (lambda: Plain(3, 4), None),
    "torch's own": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4), None),
    "Conv1D": (lambda: Conv1D(4, 3), None),
    "on a device of accelerate": (lambda: on_a_device(nn.Linear(3, 4)), None),
    "no linear": (lambda: nn.LayerNorm(3), None),
    "scaled": (lambda: Scaled(3, 4), "Scaled has a forward of its own"),
    "scaled, on a device": (lambda: on_a_device(Scaled(3, 4)), "Scaled has a forward of its own"),
    "called": (lambda: Called(3, 4), "Called has a forward of its own"),
    "patched": (lambda: patched(nn.Linear(3, 4)), "Linear has a forward of its own"),
    "odd Conv1D": (lambda: OddConv1D(4, 3), "OddConv1D has a forward of its own"),
    "hooked": (lambda: hooked(nn.Linear(3, 4)), "Linear has hooks"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "ParametrizedLinear computes its weight"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_only_what_computes_as_its_class_can_be_replaced(kind: str) -> None:
    make, reason = LEFT[kind]
    layer = make()
    assert why_left(layer) == reason
    assert is_linear(layer) == (reason is None and isinstance(layer, nn.Linear))
    assert left_linears(nn.Sequential(nn.ReLU(), layer)) == ({} if reason is None else {"1": reason})
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(layer, nn.Linear(4, 4))])
    assert [block.name for block in find_blocks(model)] == ["layers.0"]
    fits = reason is None and isinstance(layer, nn.Linear)
    assert [name for name, _ in find_linears(model)] == ["layers.0.0"] * fits + ["layers.0.1"]
    assert len(conv1d_linears(model)) == (kind == "Conv1D")


@pytest.mark.parametrize("place", sorted(HARMLESS))
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_that_is_called_harmless_is_that_of_a_linear(place: str, bias: bool) -> None:
    module, cls, _ = place.rsplit(".", 2)
    layer, plain = getattr(import_module(module), cls)(7, 5, bias=bias), nn.Linear(7, 5, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(layer(x), plain(x))
    assert is_linear(layer)


def test_heads_that_a_model_declares_are_no_blocks() -> None:
    class Music(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer()])
            self.lm_heads = nn.ModuleList([nn.Linear(4, 8), nn.Linear(4, 8)])

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_heads

    assert [block.name for block in find_blocks(Music())] == ["layers.0"]
    outer = nn.Module()
    outer.decoder = Music()
    assert [block.name for block in find_blocks(outer)] == ["decoder.layers.0"]


def test_what_is_in_a_block_is_found_by_whole_names() -> None:
    blocks = {"layers.1", "heads.0"}
    assert all(in_blocks(name, blocks) for name in ("layers.1", "layers.1.mlp.weight", "heads.0", "heads.0.bias"))
    assert not any(in_blocks(name, blocks) for name in ("layers.10", "layers", "model.layers.1", "heads.01.x", ""))
