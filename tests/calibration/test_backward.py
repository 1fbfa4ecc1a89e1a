# SPDX-License-Identifier: MIT
"""Block by block the gradients are those of the whole model; what linears saw adds up to the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_runs import CPU, losses, save, walk
from torch import Tensor, nn

from afpq.calibration.backward import step_back
from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import Activations
from afpq.errors import AfpqError
from afpq.model.unfuse import unfuse

TRIED = ("Llama", "GPT-2", "Gemma 2", "Mixtral", "OPT-350m", "Qwen3", "Falcon 7B", "Jamba")


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


class Failing(torch.autograd.Function):
    """Identity whose backward pass raises ERROR."""

    error: Exception

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise Failing.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"^out of memory .*--seq-len.*--samples.*--device"),
        (RuntimeError("no derivative"), r"cannot be run backwards \(no derivative\)"),
    ],
    ids=["memory", "derivative"],
)
def test_lack_of_memory_on_the_way_back_is_named(error: Exception, message: str, tmp_path: Path) -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Failing.apply(x)  # type: ignore[no-untyped-call]
            return result

    Failing.error = error
    states, behind = (Activations(tmp_path / name, (1, 2, 3), create=True) for name in ("states", "behind"))
    with pytest.raises(AfpqError, match=message):
        step_back(Block(), BlockCall((), {}, False), states, behind, CPU)


def test_lack_of_memory_on_the_way_forwards_again_is_named(tmp_path: Path) -> None:
    class Full(nn.Module):
        def forward(self, _x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    states, behind = (Activations(tmp_path / name, (1, 2, 3), create=True) for name in ("states", "behind"))
    with pytest.raises(AfpqError, match=r"^out of memory .*--seq-len.*--samples.*--device"):
        step_back(Full(), BlockCall((), {}, False), states, behind, CPU)
