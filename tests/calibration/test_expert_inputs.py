# SPDX-License-Identifier: MIT
"""What reaches each expert is what hooks on the whole model see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from afpq.calibration.capture import capture
from afpq.calibration.expert_inputs import Routed, Tokens, route, routed_batch
from afpq.calibration.hidden_states import Activations
from afpq.calibration.solve_block import ALONE
from afpq.calibration.stages import collect, find_stages
from afpq.errors import AfpqError
from afpq.model.blocks import find_blocks
from afpq.model.unfuse import unfuse

CPU, PLACE = torch.device("cpu"), "mlp.experts"
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    built = MixtralForCausalLM(config).eval()
    unfuse(built)
    return built


@torch.no_grad()
def test_moments_of_an_expert_are_those_of_its_tokens(model: nn.Module, tmp_path: Path) -> None:
    ids = torch.randint(32, (4, 10), generator=torch.Generator().manual_seed(1))
    seen: dict[str, list[torch.Tensor]] = {}
    block = find_blocks(model)[0]
    experts = block.module.get_submodule(PLACE)
    hooks = [
        linear.register_forward_pre_hook(lambda _m, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, linear in experts.named_modules()
        if isinstance(linear, nn.Linear)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()

    inputs = Activations(tmp_path / "in.bin", (4, 10, 16), create=True)
    calls = capture(model, [block], ids, lambda _, rows, hidden: inputs.tensor.__setitem__(rows, hidden))
    routed = route(block.module, PLACE, calls[block.name], inputs, tmp_path / "experts.bin", CPU)
    assert routed.hidden.shape == (40, 16) and routed.chosen.shape == (40, 2)
    for number, expert in experts.named_children():
        tokens = routed.tokens_of(int(number))
        first = next(tokens.batches(CPU))[1]
        for stage in find_stages(expert, ["w1", "w3", "w2"], ALONE, first):
            moments = collect(stage, ALONE, expert, tokens, None, None, CPU)
            x = torch.cat(seen[f"{number}.{stage.linears[0]}"])
            assert moments.tokens == len(x) > 0
            assert torch.allclose(moments.H, x.T @ x, rtol=1e-4, atol=1e-5)


def test_tokens_go_where_they_are_routed() -> None:
    routed = Routed(torch.arange(12.0).view(6, 2), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]]))
    assert routed.tokens_of(0).rows.tolist() == [0, 2, 3, 4]
    assert routed.tokens_of(3).rows.tolist() == []
    assert routed.tokens_of(None).rows.tolist() == list(range(6))
    assert list(routed.tokens_of(3).batches(CPU)) == []


def test_a_sample_of_tokens_is_spread_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afpq.calibration.expert_inputs.BLOCK_BATCH_TOKENS", 4)
    tokens = Tokens(torch.arange(20.0)[:, None], torch.arange(0, 20, 2))
    assert tokens.sample(CPU)[:, 0].tolist() == [0.0, 6.0, 12.0, 18.0]
    assert [len(hidden) for _, hidden in tokens.batches(CPU)] == [4, 4, 2]


def test_experts_called_otherwise_are_an_error() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Identity()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.experts(hidden)  # type: ignore[no-any-return]

    with pytest.raises(AfpqError, match=r"experts: .*use --method rtn"):
        routed_batch(Block(), "experts", ALONE, torch.zeros(2, 3, 4))
