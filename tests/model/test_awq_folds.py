# SPDX-License-Identifier: MIT
"""Every fold of every known family leaves the model's logits as they were; what is no fold is not offered."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from afpq.errors import AfpqError
from afpq.model.apply_folds import apply_fold, fold_weights, folds_of, producer_rows, shared_mean
from afpq.model.awq_folds import FAMILIES, Fold
from afpq.model.blocks import find_blocks
from afpq.model.experts import AfpqExperts
from afpq.model.unfuse import unfuse

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GATED = {**TINY, "intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {**GATED, "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {**EXPERTS, "shared_expert_intermediate_size": 32, "mlp_only_layers": [1]}
GPT2 = {"vocab_size": 96, "n_positions": 64, "bos_token_id": None, "eos_token_id": None}
LATENT = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16,
}  # fmt: skip
GATED_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
STATE_SPACE = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8}
HYBRID = {
    **GATED, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 8,
}  # fmt: skip
FALCON = {**TINY, "bias": True, "alibi": False}

# case -> model type, its config, folds expected in each block
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "llama": ("llama", {**GATED, "attention_bias": True, "mlp_bias": True}, (4, 4)),
    "llama-mha": ("llama", {**GATED, "num_key_value_heads": 4}, (4, 4)),
    "llama-mqa": ("llama", {**GATED, "num_key_value_heads": 1, "head_dim": 32}, (4, 4)),
    "mistral": ("mistral", GATED, (4, 4)),
    "ministral": ("ministral", {**GATED, "head_dim": 16}, (4, 4)),
    "mixtral": ("mixtral", EXPERTS, (2, 2)),
    "qwen2": ("qwen2", GATED, (4, 4)),
    "qwen2-moe": ("qwen2_moe", QWEN_MOE, (3, 4)),
    "qwen3": ("qwen3", {**GATED, "head_dim": 32}, (4, 4)),
    "qwen3-moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 16}, (2, 4)),
    "qwen3-next": (
        "qwen3_next",
        {**QWEN_MOE, **GATED_DELTA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        (2, 4),
    ),
    "gpt-oss": ("gpt_oss", {**EXPERTS, "head_dim": 16, "sliding_window": 8}, (2, 2)),
    "deepseek-v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 24}, (6, 5)),
    "deepseek-v3-lite": ("deepseek_v3", {**LATENT, "q_lora_rank": None}, (5, 4)),
    "granite": ("granite", {**GATED, "residual_multiplier": 0.5}, (4, 4)),
    "smollm3": ("smollm3", GATED, (4, 4)),
    "gemma": ("gemma", {**GATED, "head_dim": 16}, (4, 4)),
    "gemma2": ("gemma2", {**GATED, "head_dim": 32, "sliding_window": 8}, (4, 4)),
    "gemma3": ("gemma3_text", {**GATED, "head_dim": 32, "sliding_window": 8}, (4, 4)),
    "olmo2": ("olmo2", GATED, (2, 2)),
    "olmo3": ("olmo3", GATED, (2, 2)),
    "phi3": ("phi3", GATED, (4, 4)),
    "phi3-mha": ("phi3", {**GATED, "num_key_value_heads": 4}, (4, 4)),
    "phi": ("phi", GATED, (2, 2)),
    "stablelm": ("stablelm", {**GATED, "use_qkv_bias": True, "qk_layernorm": True}, (4, 4)),
    "stablelm-parallel": ("stablelm", {**GATED, "use_parallel_residual": True}, (3, 3)),
    "starcoder2": ("starcoder2", GATED, (3, 3)),
    "opt": ("opt", {**TINY, "ffn_dim": 96, "word_embed_proj_dim": 64}, (4, 4)),
    "opt-350m": ("opt", {**TINY, "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}, (2, 2)),
    "opt-gelu": ("opt", {**TINY, "ffn_dim": 96, "word_embed_proj_dim": 64, "activation_function": "gelu"}, (3, 3)),
    "opt-plain-norms": (
        "opt",
        {**TINY, "ffn_dim": 96, "word_embed_proj_dim": 64, "layer_norm_elementwise_affine": False},
        (2, 2),
    ),
    "gpt-neox": ("gpt_neox", {**TINY, "intermediate_size": 96}, (3, 3)),
    "gpt-neox-sequential": ("gpt_neox", {**TINY, "intermediate_size": 96, "use_parallel_residual": False}, (3, 3)),
    "bloom": ("bloom", {**TINY, "n_head": 4, "n_layer": 2}, (3, 3)),
    "bloom-post": (
        "bloom",
        {**TINY, "n_head": 4, "n_layer": 2, "apply_residual_connection_post_layernorm": True},
        (1, 1),
    ),
    "gpt2": ("gpt2", {**GPT2, "n_embd": 64, "n_head": 4, "n_layer": 2}, (3, 3)),
    "bert": ("bert", {**TINY, "intermediate_size": 96}, (1, 1)),
    "mamba": ("mamba", STATE_SPACE, (1, 1)),
    "mamba2": ("mamba2", {**STATE_SPACE, "num_heads": 8, "head_dim": 16, "n_groups": 1}, (2, 2)),
    "jamba": (
        "jamba",
        {
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        (3, 2),
    ),
    "granite-hybrid": ("granitemoehybrid", {**HYBRID, "num_local_experts": 0}, (4, 4)),
    "granite-hybrid-moe": ("granitemoehybrid", {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2}, (3, 3)),
    "falcon-7b": ("falcon", {**FALCON, "multi_query": True, "parallel_attn": True}, (2, 2)),
    "falcon-40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, (3, 3)),
    "falcon-11b": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        (2, 2),
    ),
    "falcon-rw": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}, (3, 3)),
}

IDS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


@cache
def original(case: str) -> tuple[nn.Module, Tensor]:
    """A random float64 model of the family and its logits; norms and biases random, so that none can be overlooked."""
    model_type, settings, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    config._experts_implementation = "eager"  # the others know no float64
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    before = logits(model)
    unfuse(model)
    assert torch.allclose(logits(model), before, rtol=1e-12, atol=1e-12)
    return model, before


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in find_blocks(model)]


def random_scales(block: nn.Module, fold: Fold) -> Tensor:
    """Log-uniform in [0.25, 4], equal where columns share a row of the producer."""
    rows = producer_rows(block, fold)
    assert rows is not None
    generator = torch.Generator().manual_seed(len(rows))
    return (16 ** torch.rand(int(rows.max()) + 1, generator=generator) / 4)[rows]


def change(after: Tensor, before: Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norms multiply in float32 whatever the model's dtype, which would hide small faults."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("case", CASES)
def test_each_fold_leaves_the_logits_as_they_were(case: str) -> None:
    model, before = copy.deepcopy(original(case))
    assert tuple(len(folds_of(block)) for block in blocks_of(model)) == CASES[case][2]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in blocks_of(model):
        for fold in folds_of(block):
            scales = random_scales(block, fold)
            apply_fold(block, fold, scales)
            assert change(logits(model), before) < 1e-9, fold
            for weight in fold_weights(block, fold):  # the producer alone does change them
                weight.data /= scales
            assert change(logits(model), before) > 1e-4, fold
            model.load_state_dict(state)


@pytest.mark.parametrize("case", CASES)
def test_all_folds_at_once_leave_the_logits_as_they_were(case: str) -> None:
    model, before = copy.deepcopy(original(case))
    for block in blocks_of(model):
        for fold in folds_of(block):
            apply_fold(block, fold, random_scales(block, fold))
    assert change(logits(model), before) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_linears_of_a_fold_read_one_tensor_which_shrinks(case: str) -> None:
    """What the search relies on: the linears share their input, and `inside` contains them all."""
    model, _ = copy.deepcopy(original(case))
    block = blocks_of(model)[0]
    for fold in folds_of(block):
        assert all(name.startswith(fold.inside) for name in fold.linears)
        scales = random_scales(block, fold)
        before = inputs_of(model, block, fold)
        apply_fold(block, fold, scales)
        for old, new in zip(before, inputs_of(model, block, fold)):
            torch.testing.assert_close(old, before[0], rtol=0, atol=0)
            torch.testing.assert_close(new * scales, old, rtol=1e-6, atol=1e-9)


def inputs_of(model: nn.Module, block: nn.Module, fold: Fold) -> list[Tensor]:
    seen: list[Tensor] = []
    linears = [block.get_submodule(name) for name in fold.linears]
    handles = [linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for linear in linears]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def test_every_family_is_tested() -> None:
    tested = {type(block).__name__ for case in CASES for block in blocks_of(original(case)[0])}
    assert tested == set(FAMILIES)


def test_other_blocks_have_no_folds() -> None:
    class LlamaDecoderLayer(nn.Module):  # a known name, but not Transformers' own
        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm = nn.LayerNorm(8)
            self.self_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})

    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=8))
    conv1d = gpt2.transformer.h[0]  # a Conv1D is no linear until it is made one
    assert folds_of(LlamaDecoderLayer()) == folds_of(conv1d) == folds_of(nn.Linear(4, 4)) == ()


@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_an_expert_has_a_fold_that_leaves_its_outputs(case: str) -> None:
    model = copy.deepcopy(original(case)[0])
    experts = next(module for module in model.modules() if isinstance(module, AfpqExperts))
    for expert in experts.children():
        (fold,) = folds_of(expert)
        (down,) = fold_weights(expert, fold)
        before = down.clone()
        apply_fold(expert, fold, torch.linspace(0.5, 2, down.shape[1]))
        assert not torch.allclose(down, before)
    assert torch.allclose(logits(model), original(case)[1], rtol=1e-9, atol=1e-9)


def test_a_linear_replaced_by_something_else_ends_its_folds() -> None:
    block = blocks_of(copy.deepcopy(original("llama")[0]))[0]
    block.get_submodule("mlp").gate_proj = nn.Identity()
    assert [fold.linears[-1] for fold in folds_of(block)] == ["self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"]


def v_o(case: str) -> tuple[nn.Module, Fold]:
    block = blocks_of(copy.deepcopy(original(case)[0]))[0]
    return block, next(fold for fold in folds_of(block) if fold.layout not in ("same", "gate_up"))


@pytest.mark.parametrize("case", ["llama", "phi3", "falcon-40b"])
def test_columns_that_share_a_row_need_one_scale(case: str) -> None:
    block, fold = v_o(case)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    scales = torch.linspace(1, 2, 64)
    with pytest.raises(AfpqError, match="share a row"):
        apply_fold(block, fold, scales)
    torch.testing.assert_close(block.state_dict(), before, rtol=0, atol=0)
    shared = shared_mean(block, fold, scales)
    apply_fold(block, fold, shared)
    # 4 query heads of 16 channels, 2 heads of v: neighbouring query heads share one
    heads = scales.view(2, 2, 16)
    torch.testing.assert_close(shared.view(2, 2, 16), heads.mean(1, keepdim=True).expand(2, 2, 16))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_impossible_scales_are_errors(bad: float) -> None:
    block = blocks_of(copy.deepcopy(original("llama")[0]))[0]
    with pytest.raises(AfpqError, match="positive"):
        apply_fold(block, folds_of(block)[0], torch.tensor([1.0] * 63 + [bad]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["gemma2", "opt", "llama"])
def test_norms_rounded_for_saving_keep_the_function(case: str, stored: torch.dtype) -> None:
    """The linears follow what the norm was really divided by, even where 1 + weight loses most of its digits."""
    model, before = copy.deepcopy(original(case))
    block = blocks_of(model)[0]
    folds = [fold for fold in folds_of(block) if fold.layout == "same" and "norm" in fold.previous]
    assert folds
    for fold in folds:
        wanted = 300 ** torch.linspace(-1, 1, 64)
        applied = apply_fold(block, fold, wanted, stored)
        weight = block.get_parameter(f"{fold.previous}.weight")
        torch.testing.assert_close(weight.data, weight.data.to(stored).double())
        assert (applied / wanted).log2().abs().max() < 1.01
        assert change(logits(model), before) < 1e-9


def test_rounding_erases_no_channel() -> None:
    block = blocks_of(copy.deepcopy(original("gemma")[0]))[0]
    fold = folds_of(block)[0]
    weight = block.get_parameter("input_layernorm.weight")
    weight.data[0], weight.data[1] = -1.0, 0.5  # 1 + weight: none, and more than bfloat16 can divide by 10000
    applied = apply_fold(block, fold, torch.full((64,), 1e4), torch.bfloat16)
    assert weight[0] == -1 and applied[0] == 1e4
    assert weight[1] == 0.5 and applied[1] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_any_dtype(dtype: torch.dtype) -> None:
    model = copy.deepcopy(original("qwen2")[0]).to(dtype)
    before = logits(model)
    for block in blocks_of(model):
        for fold in folds_of(block):
            applied = apply_fold(block, fold, random_scales(block, fold))
            assert applied.shape == fold_weights(block, fold)[0].shape[1:]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert change(logits(model), before) < (0.1 if dtype == torch.bfloat16 else 1e-4)
