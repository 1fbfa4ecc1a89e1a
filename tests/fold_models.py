# SPDX-License-Identifier: MIT
"""Random float64 models of all families with folds, and random scales to fold into their blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from afpq.model.apply_folds import producer_rows
from afpq.model.awq_folds import Fold
from afpq.model.blocks import find_blocks
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
