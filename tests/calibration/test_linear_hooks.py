# SPDX-License-Identifier: MIT
"""What is recorded of linears while gradients pass: inputs, gradients, and who reads the same tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_runs import save, walk
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from afpq.calibration.linear_hooks import SecondMoment, recording, with_hooks


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


class Pair(nn.Module):
    """Two linears on one tensor, the second with a bias, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.behind = nn.Linear(3, 5, bias=False), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.left(x) * self.right(x))  # type: ignore[no-any-return]


def test_the_statistics_of_windows_add_up_to_those_of_all() -> None:
    """Inputs that are read by two linears are kept once; growth leaves the bias out."""
    torch.manual_seed(0)
    block, x = Pair(), torch.randn(4, 6, 3, requires_grad=True)
    names, taps = ["left", "right", "behind"], {}
    for rows in (slice(0, 2), slice(2, 4)):
        with recording(names, (4, 6), ("right",), taps, block, rows):
            result = block(x[rows])
        result.square().sum().backward()
    left, right = block.left(x), block.right(x)
    gradients = torch.autograd.grad(block.behind(left * right).square().sum(), [left, right])
    for name, gradient in zip(("left", "right"), gradients):
        tap, weight = taps[name], block.get_submodule(name).weight
        assert torch.allclose(tap.gradient, gradient.square().sum((0, 1)), rtol=1e-4)
        expected = (gradient * (x @ weight.T)).sum((1, 2)).double()
        assert torch.allclose(tap.growth, expected, rtol=1e-3, atol=1e-4)
        assert tap.readers == ("left", "right")
    assert taps["left"].gram is taps["right"].gram and taps["left"].gram.tokens == 24
    flat = x.detach().flatten(0, 1)
    assert torch.allclose(taps["left"].gram.matrix(), flat.T @ flat, rtol=1e-4)
    assert [name for name, tap in taps.items() if tap.outputs is not None] == ["right"]


def test_hooks_are_gone_afterwards_whatever_happens() -> None:
    block, called = Pair(), []

    def hook(name: str, *_: Any) -> None:
        called.append(name)

    with pytest.raises(ZeroDivisionError), with_hooks(block, ["left", "behind"], hook):
        block(torch.zeros(1, 3))
        raise ZeroDivisionError
    block(torch.zeros(1, 3))
    assert called == ["left", "behind"]
