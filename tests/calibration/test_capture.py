# SPDX-License-Identifier: MIT
"""Block by block gives what the whole model gives; stages and moments are what hooks on the whole model see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_runs import CONFIGS, ids, stored, tiny
from torch import Tensor, nn

from afpq.calibration.capture import BlockCall, advance, capture, materialize
from afpq.calibration.hidden_states import Activations
from afpq.errors import AfpqError
from afpq.model.blocks import find_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(CONFIGS))
@torch.no_grad()
def test_block_by_block_equals_the_whole_model(name: str, tmp_path: Path) -> None:
    model, windows = tiny(name), ids()
    wanted = model(windows, output_hidden_states=True, use_cache=False).hidden_states
    first = torch.empty(4, 12, 32)
    blocks = find_blocks(model)

    def write(name: str, rows: slice, hidden: Tensor) -> None:
        assert name == blocks[0].name
        first[rows] = hidden

    calls = capture(model, blocks, windows, write)
    assert list(calls) == [block.name for block in blocks]
    states = stored(tmp_path / "0", first)
    for index, (block, call) in enumerate(zip(blocks, calls.values())):
        assert torch.allclose(states.tensor, wanted[index], atol=1e-5)
        following = Activations(tmp_path / str(index + 1), (4, 12, 32), create=True)
        advance(block.module, call, states, following, CPU)
        states = following


class Chain(nn.Module):
    """An embedding, a tower that text does not reach, and blocks run last to first, with something done between."""

    def __init__(self, between: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]) -> None:
        super().__init__()
        self.between = between
        self.embed = nn.Embedding(99, 32)
        self.tower, self.layers = (
            nn.ModuleList(nn.ModuleDict({"linear": nn.Linear(32, 32)}) for _ in range(2)) for _ in range(2)
        )

    def forward(self, tokens: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(tokens)
        for layer in reversed(self.layers):
            hidden, more = self.between(hidden)
            hidden = layer(hidden, **more)
        return hidden


@pytest.mark.parametrize(
    "between",
    [
        lambda hidden: (hidden, {"extra": hidden.mean()}),
        lambda hidden: (hidden + 1, {}),
        lambda hidden: (hidden.add_(1), {}),
    ],
    ids=["state of the text beside", "hidden states changed", "changed in place"],
)
def test_what_a_block_cannot_be_given_alone_is_refused(between: Any) -> None:
    model = Chain(between)
    with pytest.raises(AfpqError, match="use --method rtn"):
        capture(model, find_blocks(model), ids(4, 4096), lambda *_: None)


def test_blocks_are_recorded_in_the_order_they_run_and_only_those() -> None:
    model, begun = Chain(lambda hidden: (hidden, {})), []
    calls = capture(model, find_blocks(model), ids(), lambda name, rows, _: begun.append((name, rows)))
    assert list(calls) == ["layers.1", "layers.0"]
    assert begun == [("layers.1", slice(0, 4))]


def test_a_parameter_under_another_name_is_an_error() -> None:
    with torch.device("meta"):
        linear = nn.Linear(2, 2)
    with pytest.raises(AfpqError, match="bias"):
        materialize(linear, {"weight": torch.ones(2, 2)}, CPU)


@torch.no_grad()
def test_outputs_that_overflow_are_an_error(tmp_path: Path) -> None:
    model = tiny("llama")
    blocks = find_blocks(model)
    first: list[Tensor] = []
    call = capture(model, blocks, ids(), lambda *state: first.append(state[2]))[blocks[0].name]
    blocks[0].module.get_submodule("mlp.down_proj").weight.fill_(torch.inf)  # type: ignore[operator, union-attr]
    states = stored(tmp_path / "a", first[0])
    with pytest.raises(AfpqError, match="NaN or Inf"):
        advance(blocks[0].module, call, states, Activations(tmp_path / "b", (4, 12, 32), True), CPU)


CPU_FULL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
FULL = pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_FULL), MemoryError()], ids=type
)


@FULL
def test_lack_of_memory_is_not_called_an_unsupported_architecture(error: Exception) -> None:
    model = tiny("llama")

    def fail(*_: Any) -> None:
        raise error

    model.get_submodule("model.embed_tokens").register_forward_pre_hook(fail)
    with pytest.raises(AfpqError, match=r"^out of memory .*--seq-len.*--samples.*--device"):
        capture(model, find_blocks(model), ids(), lambda *_: None)


@FULL
def test_lack_of_memory_in_a_block_is_named(error: Exception, tmp_path: Path) -> None:
    class Full(nn.Module):
        def forward(self, _x: Tensor) -> Tensor:
            raise error

    before, behind = (Activations(tmp_path / name, (1, 2, 3), create=True) for name in ("a", "b"))
    with pytest.raises(AfpqError, match=r"^out of memory .*--seq-len.*--samples.*--device"):
        advance(Full(), BlockCall((), {}, False), before, behind, CPU)


def test_other_errors_are_not_called_a_lack_of_memory() -> None:
    model = tiny("llama")

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    model.get_submodule("model.embed_tokens").register_forward_pre_hook(fail)
    with pytest.raises(AfpqError, match=r"cannot run this architecture block by block \(shapes do not fit\)"):
        capture(model, find_blocks(model), ids(), lambda *_: None)
