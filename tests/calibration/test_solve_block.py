# SPDX-License-Identifier: MIT
"""One block: stages in turn, each fed by the quantized ones before it, or all by the float ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from afpq import GptqOptions, Recipe, parse_scheme
from afpq.algorithms import quantize_gptq
from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import Activations
from afpq.calibration.solve_block import BlockSolver, BlockState, Solved, below, kinds_of
from afpq.checkpoint.plan import Target
from afpq.model.tensor_part import TensorPart

SCHEME = parse_scheme("nf2-asym-g16")


class Block(nn.Module):
    """Two linears one after the other, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.unused = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def solve(scratch: Path, sequential: bool) -> tuple[Block, Tensor, Solved]:
    """(the block before, its inputs [tokens, 16], what became of its linears)."""
    torch.manual_seed(0)
    block, changed = Block(), Block()
    changed.load_state_dict(block.state_dict())
    states = Activations(scratch / f"states-{sequential}.bin", (4, 24, 16), True)
    states.tensor.copy_(torch.randn(4, 24, 16))
    options = GptqOptions(float_target=False, sequential=sequential)
    solver = BlockSolver(Recipe(SCHEME, "gptq", options=options), torch.device("cpu"), scratch, False)
    targets = {
        name: Target(f"b.{name}", TensorPart(f"b.{name}.weight"), SCHEME, tuple(linear.weight.shape), f"b.{name}.")
        for name, linear in block.named_children()
    }
    with torch.no_grad():
        state = BlockState(BlockCall((), {}, False), changed, states, None, None)
        return block, states.tensor.flatten(0, 1).clone(), solver.solve(state, targets, 0)


def test_later_stages_read_the_quantized_ones_before_them_if_in_sequence(tmp_path: Path) -> None:
    for sequential in (True, False):
        block, x, solved = solve(tmp_path, sequential)
        up = solved["up"][0]
        weight = up.dequantize() if sequential else block.up.weight
        with torch.no_grad():
            hidden = torch.relu(nn.functional.linear(x, weight, block.up.bias))
            expected = quantize_gptq(block.down.weight, hidden.T @ hidden, SCHEME)[0]
        assert torch.equal(solved["down"][0].codes, expected.codes), sequential


def test_a_linear_that_is_not_called_is_rounded_to_nearest(tmp_path: Path) -> None:
    _, _, solved = solve(tmp_path, True)
    assert solved["unused"][1].method == "rtn" and "not used" in str(solved["unused"][1].note)
    assert {solved[name][1].method for name in ("up", "down")} == {"gptq"}


def test_names_inside_a_module() -> None:
    assert below("a.b", {"a.b.c": 1, "a.bc.d": 2, "a.b.c.d": 3}) == {"c": 1, "c.d": 3}


def test_the_float_model_is_kept_only_if_needed() -> None:
    off = GptqOptions(float_target=False)
    kinds = {m: kinds_of(Recipe(SCHEME, m, options=None if m == "awq" else off)) for m in ("gptq", "awq", "tune")}
    assert kinds == {"gptq": ("quantized",), "awq": ("quantized",), "tune": ("quantized", "float")}
