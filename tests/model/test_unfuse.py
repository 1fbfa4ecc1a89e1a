# SPDX-License-Identifier: MIT
"""Conv1D and fused experts become linears, and the model's outputs stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from afpq.errors import AfpqError
from afpq.model.blocks import TransposedLinear, conv1d_linears, find_linears
from afpq.model.experts import AfpqExperts
from afpq.model.unfuse import unfuse

IDS = torch.arange(12)[None]


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=32)).eval()


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    return MixtralForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_outputs_stay_and_every_matrix_is_a_linear(make: object) -> None:
    model = make()  # type: ignore[operator]
    before = model(IDS).logits
    count = sum(p.numel() for p in model.parameters())
    unfuse(model)
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == count
    matrices = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim > 1 and ".0." in name}
    assert matrices - {name for name, _ in find_linears(model)} <= {"model.layers.0.mlp.gate"}  # the router


def test_only_what_is_chosen_is_replaced() -> None:
    model = gpt2()
    unfuse(model, lambda name: name.endswith("c_fc"))
    assert {name.rpartition(".")[2] for name, _ in conv1d_linears(model)} == {"c_attn", "c_proj"}
    assert sum(isinstance(module, TransposedLinear) for module in model.modules()) == 2
    model = mixtral()
    unfuse(model, lambda name: "layers.1" in name)
    assert [name for name, m in model.named_modules() if isinstance(m, AfpqExperts)] == ["model.layers.1.mlp.experts"]


def test_half_a_layer_of_experts_is_an_error() -> None:
    with pytest.raises(AfpqError, match=r"layers\.0\.mlp\.experts: 3 of its 9"):
        unfuse(mixtral(), lambda name: name.endswith("w2"))


def test_experts_get_the_names_of_the_models_files() -> None:
    model = mixtral()
    unfuse(model)
    assert {name.rpartition(".")[2] for name, _ in find_linears(model) if "experts" in name} == {"w1", "w2", "w3"}
