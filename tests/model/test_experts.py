# SPDX-License-Identifier: MIT
"""Experts as linears do what the fused module did; forms that are not known are left alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from afpq.errors import AfpqError
from afpq.model.experts import AfpqExperts, all_or_none, expert_form, fill_experts, fuse_experts, split_experts

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip

# model type -> (config, experts, gated, transposed, interleaved, scales of up go through, biases)
FORMS: dict[str, tuple[dict[str, Any], int, bool, bool, bool, bool, bool]] = {
    "mixtral": ({"num_local_experts": 5}, 5, True, False, False, True, False),
    "qwen3_moe": ({"num_experts": 4, "head_dim": 8}, 4, True, False, False, True, False),
    "deepseek_v3": ({"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
                    4, True, False, False, True, False),
    "gpt_oss": ({"num_local_experts": 3, "head_dim": 8, "layer_types": ["full_attention"]},
                3, True, True, True, False, True),
}  # fmt: skip


@cache
def fused_module(model_type: str) -> nn.Module:
    """The module of experts of a random model, in float32, running as Transformers' own loop."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **FORMS[model_type][0]})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float()
    module = next(m for m in model.modules() if expert_form(m) is not None)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def split_module(model_type: str) -> tuple[nn.Module, AfpqExperts]:
    """(the fused module, the same experts as linears)."""
    module = fused_module(model_type)
    form = expert_form(module)
    assert form is not None
    split = split_experts(module, form)
    fill_experts(split, module)
    return module, split


def routed(experts: int, tokens: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a choice of two experts for each, and weights; expert 1 gets no token."""
    generator = torch.Generator().manual_seed(1)
    others = torch.tensor([e for e in range(experts) if e != 1])
    chosen = torch.stack([others[torch.randperm(len(others), generator=generator)[:2]] for _ in range(tokens)])
    return torch.randn(tokens, 32, generator=generator), chosen, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("model_type", FORMS)
def test_the_form_is_told_by_the_parameters(model_type: str) -> None:
    form = expert_form(fused_module(model_type))
    assert form is not None
    found = (form.experts, len(form.names) == 3, form.transposed, form.interleaved, form.linear_in_up, form.bias)
    assert found == FORMS[model_type][1:]
    assert (form.hidden, form.inner) == (32, 24)


@pytest.mark.parametrize("model_type", FORMS)
def test_split_experts_give_the_fused_outputs(model_type: str) -> None:
    module, split = split_module(model_type)
    inputs = routed(split.form.experts)
    expected = module(*inputs)
    assert torch.allclose(split(*inputs), expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("model_type", FORMS)
def test_fusing_again_gives_the_same_parameters(model_type: str) -> None:
    module, split = split_module(model_type)
    again = fuse_experts(split)
    assert type(again) is type(module)
    before = dict(module.named_parameters())
    assert before.keys() == dict(again.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in again.named_parameters())


def test_splitting_copies_nothing() -> None:
    module, split = split_module("mixtral")
    storage = module.get_parameter("gate_up_proj").untyped_storage().data_ptr()
    assert split.get_submodule("3.up_proj").weight.untyped_storage().data_ptr() == storage


def test_an_index_beyond_the_experts_is_no_expert() -> None:
    module, split = split_module("mixtral")
    hidden, chosen, weights = routed(split.form.experts)
    chosen[:, 1] = split.form.experts
    assert torch.allclose(split(hidden, chosen, weights), module(hidden, chosen, weights), atol=1e-6)


def test_no_tokens_give_no_outputs() -> None:
    _, split = split_module("mixtral")
    empty = split(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert empty.shape == (0, 32)


@torch.no_grad()
def test_experts_without_a_gate() -> None:
    """Nemotron-H: `up_proj`, squared ReLU, `down_proj`."""
    config = AutoConfig.for_model("nemotron_h")
    config.update({"hidden_size": 32, "moe_intermediate_size": 24, "n_routed_experts": 4})
    config._experts_implementation = "eager"
    from transformers.models.nemotron_h import modeling_nemotron_h

    module = modeling_nemotron_h.NemotronHExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    form = expert_form(module)
    assert form is not None and form.names == ("up_proj", "down_proj") and not form.linear_in_up
    split = split_experts(module, form)
    fill_experts(split, module)
    hidden, chosen, weights = routed(4)
    hidden = hidden[:, : form.hidden]
    assert torch.allclose(split(hidden, chosen, weights), module(hidden, chosen, weights), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """Looks like experts, but the gate cannot be told from up."""

    is_transposed = False

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def _apply_gate(self, x: Tensor) -> Tensor:
        return x[..., : x.shape[-1] // 2] + x.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),
        Odd(gate_up_proj=(2, 8, 4), down_proj=(2, 4, 4)),
        Odd(gate_up_proj=(2, 9, 4), down_proj=(2, 4, 4)),
        Odd(gate_up_proj=(8, 4), down_proj=(4, 4)),
        Odd(gate_up_proj=(2, 8, 4), down_proj=(2, 4, 4), extra=(2,)),
        Odd(down_proj=(2, 4, 4)),
    ],
)
def test_what_is_not_known_is_left_alone(module: nn.Module) -> None:
    assert expert_form(module) is None


def test_a_layer_of_experts_is_quantized_whole_or_not_at_all() -> None:
    assert all_or_none("x", [True, True]) and not all_or_none("x", [False])
    with pytest.raises(AfpqError, match=r"mlp\.experts: 2 of its 3 linears"):
        all_or_none("mlp.experts", [True, False, True])


def test_experts_are_named_as_asked() -> None:
    form = expert_form(fused_module("mixtral"), ("w1", "w3", "w2"))
    assert form is not None
    names = [name for name, _ in AfpqExperts(form, None).named_modules() if name.startswith("2.")]
    assert names == ["2.w1", "2.w3", "2.w2"]
