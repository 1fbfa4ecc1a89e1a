# SPDX-License-Identifier: MIT
"""Block by block the gradients are those of the whole model; what linears saw adds up to the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from gradient_runs import CPU, WINDOWS, losses, save
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from afpq.calibration.backward import FloatModelPass, Listener
from afpq.calibration.linear_hooks import LinearStatistics, SecondMoment, listening
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.blocks import Block
from afpq.model.skeleton import build_skeleton
from afpq.model.unfuse import unfuse
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

TRIED = ("Llama", "GPT-2", "Gemma 2", "Mixtral", "OPT-350m", "Qwen3", "Falcon 7B", "Jamba")


def walk(directory: Path, scratch: Path) -> dict[str, LinearStatistics]:
    """What all linears saw, by full names, a block at a time."""
    checkpoint, skeleton = open_checkpoint(directory), build_skeleton(directory)
    plan = make_plan(checkpoint, skeleton, Recipe(parse_scheme("nf4-asym-g32-log8")))
    passes = FloatModelPass(plan, skeleton, WINDOWS, scratch, CPU, lambda *_: None)
    passes.forwards()
    taps: dict[str, LinearStatistics] = {}
    found: dict[str, LinearStatistics] = {}

    def listen(block: Block) -> Listener:
        found.clear()
        wanted = {target.module for target in plan.block_targets}
        names = [name.removeprefix(f"{block.name}.") for name, _ in block.linears() if name in wanted]
        return partial(listening, names, WINDOWS.shape, names, found)

    for block in passes.backwards(3, listen):
        taps |= {f"{block.name}.{name}": tap for name, tap in found.items()}
    return taps


def whole(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor, list[float]]]:
    """(sum of x x^T, sum of squared gradients, gradients times outputs for each window) of linears, by autograd through
    all of the model."""
    sums: dict[str, tuple[Tensor, Tensor, list[float]]] = {}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda _m, args, out: seen.append((name, args[0].detach().flatten(0, -2), out))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for loss in losses(model, 3):
        gradients = torch.autograd.grad(loss, [out for _, _, out in seen], allow_unused=True)
        for (name, x, out), gradient in zip(seen, gradients):
            gradient = torch.zeros_like(out) if gradient is None else gradient
            output = x @ model.get_submodule(name).weight.T  # `out` may have been changed in place
            growth = (gradient.flatten(0, -2) * output).sum().item()
            H, G, growths = sums.get(name, (0, 0, []))
            sums[name] = H + x.T @ x, G + gradient.square().flatten(0, -2).sum(0), [*growths, growth]
        seen.clear()
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("family", TRIED)
def test_a_block_at_a_time_is_the_whole_model(tmp_path: Path, family: str) -> None:
    model = save(family, tmp_path / "model")
    taps = walk(tmp_path / "model", tmp_path)
    unfuse(model)
    expected = whole(model, list(taps))
    assert len(taps) >= 8 and taps.keys() == expected.keys()
    for name, tap in taps.items():
        H, G, growth = expected[name]
        E = torch.randn(5, H.shape[0])
        assert torch.allclose(tap.gram.product(E, E), ((E @ H) * E).sum(1), rtol=1e-3), name
        assert torch.allclose(tap.gram.diagonal(), H.diagonal(), rtol=1e-3, atol=1e-6), name
        assert torch.allclose(tap.gradient, G, rtol=2e-3, atol=1e-5 * G.max().item()), name
        assert tap.outputs is not None and torch.allclose(tap.outputs.diagonal(), tap.gradient, rtol=1e-3, atol=1e-9)
        if "experts" not in name:
            assert tap.growth.tolist() == pytest.approx(growth, rel=1e-2, abs=1e-3 * max(1, *map(abs, growth))), name
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_linears_that_read_the_same_tensor_know_each_other(tmp_path: Path) -> None:
    save("Llama", tmp_path / "model")
    taps = walk(tmp_path / "model", tmp_path)
    attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
    assert taps["model.layers.1.self_attn.k_proj"].readers == attention
    assert taps["model.layers.0.mlp.up_proj"].readers == ("mlp.gate_proj", "mlp.up_proj")
    assert taps["model.layers.0.mlp.down_proj"].readers == ("mlp.down_proj",)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), width=st.integers(1, 12))
def test_a_gram_is_the_same_by_tokens_or_summed(sizes: list[int], width: int) -> None:
    parts = [torch.randn(size, width) for size in sizes]
    gram, x, E = SecondMoment(), torch.cat(parts), torch.randn(3, width)
    for part in parts:
        gram.add(part)
    assert gram.tokens == len(x) and (gram.H is None) == (len(x) <= width)
    assert torch.allclose(gram.diagonal(), x.square().sum(0), atol=1e-4)
    F = torch.randn(3, width)
    assert torch.allclose(gram.product(E, F), ((x @ E.T) * (x @ F.T)).sum(0), rtol=1e-3, atol=1e-3)
