# SPDX-License-Identifier: MIT
"""AWQ on a block: its function stays, and rounding it hurts less than before."""

from __future__ import annotations

import copy

import pytest
import torch
from block_runs import ids, tiny
from torch import Tensor, nn

from afpq.algorithms import quantize_rtn
from afpq.calibration.awq_block import awq_scale
from afpq.calibration.capture import BlockCall, capture
from afpq.model.blocks import find_blocks
from afpq.numerics.scheme import Scheme, parse_scheme


def first_block(name: str) -> tuple[nn.Module, BlockCall, Tensor]:
    """(a model's first block, how it is called, what enters it); some channels are much larger than others."""
    model, seen = tiny(name), []
    blocks = find_blocks(model)
    for block in blocks:
        for part, parameter in block.module.named_parameters():
            if "norm" in part and part.endswith("weight"):
                parameter.data = torch.exp(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    call = capture(model, blocks, ids(), lambda *state: seen.append(state[2]))[blocks[0].name]
    return blocks[0].module, call, seen[0]


def schemes_of(block: nn.Module, scheme: str) -> dict[str, Scheme]:
    return {name: parse_scheme(scheme) for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def rounding_error(block: nn.Module, call: BlockCall, hidden: Tensor, schemes: dict[str, Scheme]) -> float:
    """The squared error of the block's outputs when its linears are rounded to nearest."""
    rounded = copy.deepcopy(block)
    for name, scheme in schemes.items():
        weight = rounded.get_submodule(name).get_parameter("weight")
        weight.copy_(quantize_rtn(weight, scheme).dequantize())
    return (call(rounded, hidden) - call(block, hidden)).square().sum().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox"])
def test_the_function_stays_and_rounding_hurts_less(name: str) -> None:
    block, call, hidden = first_block(name)
    schemes = schemes_of(block, "int3-sym-g-1-float32")
    wanted, before = call(block, hidden), rounding_error(block, call, hidden, schemes)
    ratios = awq_scale(block, call, hidden, schemes, {})
    torch.testing.assert_close(call(block, hidden), wanted, rtol=1e-4, atol=1e-5)
    assert ratios and min(ratios.values()) < 1 and max(ratios.values()) <= 1
    assert rounding_error(block, call, hidden, schemes) < before


@torch.no_grad()
def test_what_is_not_quantized_is_left_as_it_can_be_saved() -> None:
    """Norms are rounded to the dtype of the files; the linears that are quantized are not rounded before."""
    block, call, hidden = first_block("llama")
    stored = {name: torch.bfloat16 for name, _ in block.named_parameters()}
    awq_scale(block, call, hidden, schemes_of(block, "nf3-asym-g16"), stored)
    saved = {name: torch.equal(p, p.bfloat16().float()) for name, p in block.named_parameters()}
    assert {name for name, exact in saved.items() if exact} == {name for name in saved if "norm" in name}


@torch.no_grad()
def test_without_schemes_nothing_is_scaled() -> None:
    block, call, hidden = first_block("llama")
    before = {name: p.clone() for name, p in block.named_parameters()}
    assert awq_scale(block, call, hidden, {}, {}) == {}
    assert all(torch.equal(before[name], p) for name, p in block.named_parameters())
