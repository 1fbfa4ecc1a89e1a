# SPDX-License-Identifier: MIT
"""Small random models of some families, and plans of their quantization."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from afpq import Recipe, parse_scheme
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.skeleton import build_skeleton

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, **NO_TOKENS}
WIDE = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
SMALLEST = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip


def llama(tied: bool) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=tied, initializer_range=0.1))


def gemma2(tied: bool) -> PreTrainedModel:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied, initializer_range=0.1)
    return Gemma2ForCausalLM(config)


def opt(tied: bool) -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {**SIZES, "pad_token_id": 1}
    config = OPTConfig(
        **sizes, hidden_size=64, ffn_dim=96, word_embed_proj_dim=32, max_position_embeddings=64,
        tie_word_embeddings=tied, init_std=0.1,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gpt2(tied: bool) -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=tied, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Save a model in float16; returns the directory."""
    model.to(torch.float16).save_pretrained(directory)
    return directory


def plan_of(directory: Path, scheme: str = "nf4-asym-g64", **recipe: object) -> Plan:
    """Plan the quantization of a checkpoint by a scheme; `recipe`: its other fields."""
    made = Recipe(parse_scheme(scheme), **recipe)  # type: ignore[arg-type]
    return make_plan(open_checkpoint(directory), build_skeleton(directory), made)


def model_of(model_type: str, **changes: object) -> PreTrainedModel:
    """Build the smallest random model of a type, with experts where the type has them."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALLEST, **changes}))  # type: ignore[no-any-return]


def bert() -> PreTrainedModel:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**WIDE))


def t5() -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, tie_word_embeddings=True)
    return T5ForConditionalGeneration(config)
