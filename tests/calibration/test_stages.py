# SPDX-License-Identifier: MIT
"""Linears that read one tensor form a stage, and its moments are those of what they read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_runs import ids, stored, tiny
from torch import Tensor, nn

from afpq.calibration.capture import BlockCall, capture
from afpq.calibration.stages import arguments_of, collect, find_stages, input_of
from afpq.errors import AfpqError
from afpq.model.blocks import find_blocks

CPU = torch.device("cpu")


@torch.no_grad()
def test_stages_are_the_linears_that_read_one_tensor(tmp_path: Path) -> None:
    model, windows = tiny("llama"), ids()
    block = find_blocks(model)[0]
    first: list[Tensor] = []
    call = capture(model, find_blocks(model), windows, lambda *state: first.append(state[2]))[block.name]
    names = [name.removeprefix(f"{block.name}.") for name, _ in block.linears()]
    stages = find_stages(block.module, names, call, first[0])
    attention, mlp = "self_attn.", "mlp."
    assert [set(stage.linears) for stage in stages] == [
        {attention + "q_proj", attention + "k_proj", attention + "v_proj"},
        {attention + "o_proj"},
        {mlp + "gate_proj", mlp + "up_proj"},
        {mlp + "down_proj"},
    ]
    # The moments are those of what the linear really reads.
    seen: list[Tensor] = []
    handle = block.module.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call(block.module, first[0])
    handle.remove()
    x = seen[0].flatten(0, 1).double()
    assert torch.allclose(input_of(block.module, "mlp.down_proj", call, first[0]).double(), x)
    states, shifted = stored(tmp_path / "a", first[0]), stored(tmp_path / "b", first[0] * 1.1)
    moments = collect(stages[3], call, block.module, states, block.module, shifted, CPU)
    assert moments.tokens == 48 and torch.allclose(moments.H.double(), x.T @ x, rtol=1e-4, atol=1e-5)
    f = input_of(block.module, "mlp.down_proj", call, first[0] * 1.1).double()
    assert moments.D is not None and torch.allclose(moments.D.double(), x.T @ (f - x), rtol=1e-3, atol=1e-5)


class Three(nn.Module):
    """Two linears one after the other, the first called twice, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        inside = self.first(hidden) + self.first(hidden)
        self.calls += 1
        return self.second(inside)  # type: ignore[no-any-return]


ALONE = BlockCall((), {}, False)


def test_a_linear_called_twice_is_in_one_stage_and_an_unused_one_in_none() -> None:
    stages = find_stages(Three(), ["unused", "second", "first"], ALONE, torch.zeros(2, 3, 4))
    assert [stage.linears for stage in stages] == [("first",), ("second",)]


def test_a_pass_ends_at_the_module_whose_arguments_are_wanted() -> None:
    block = Three()
    hidden = torch.randn(2, 3, 4)
    assert torch.equal(input_of(block, "first", ALONE, hidden), hidden.flatten(0, 1)) and block.calls == 0
    args, kwargs = arguments_of(block, "second", ALONE, hidden)
    assert torch.allclose(args[0], 2 * block.first(hidden)) and kwargs == {} and block.calls == 1


def test_hooks_are_gone_afterwards_and_a_module_that_is_not_called_is_an_error() -> None:
    block = Three()
    with pytest.raises(AfpqError, match="unused: is not called"):
        arguments_of(block, "unused", ALONE, torch.zeros(2, 3, 4))
    find_stages(block, ["first", "second"], ALONE, torch.zeros(2, 3, 4))
    assert not any(module._forward_pre_hooks for module in block.modules())
