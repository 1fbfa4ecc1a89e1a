# SPDX-License-Identifier: MIT
"""Families of models and what is claimed of each.

`test_families.py` holds the claims to be true; docs/models.md is made of them (`python tests/families.py`). A new
family is one entry here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import afpq

TABLE = Path(__file__).parents[1] / "docs" / "models.md"

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GATED = {**TINY, "intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = {**GATED, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {**TINY, "ffn_dim": 48}
FALCON = {**TINY, "bias": True, "alibi": False}
STATE_SPACE = {
    "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 256, "state_size": 4, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny configuration of an architecture, and what is claimed of it.

    `coverage` in percent of the blocks' weights; `folds`: AWQ's fold points in all its blocks, 0 where its weights are
    only clipped. `refused`: words of the error where calibrated methods cannot be used. `not_run`: parts of the names
    of linears that calibration does not reach, which are rounded to nearest. `pending`: what is still missing; the
    tests of such a family are expected to fail, and fail themselves once they do not. `since`: the version of
    Transformers from which all of it holds.
    """

    architecture: str
    config: Mapping[str, Any]
    coverage: float = 100.0
    folds: int = 0
    note: str = ""
    refused: str = ""
    not_run: tuple[str, ...] = ()
    pending: str = ""
    since: str = "5.0"


FAMILIES: dict[str, Family] = {
    "Llama": Family("LlamaForCausalLM", GATED, folds=8),
    "Llama, biases": Family(
        "LlamaForCausalLM", {**GATED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, folds=8,
        note="tied embeddings",
    ),
    "Mistral": Family("MistralForCausalLM", {**GATED, "sliding_window": 8}, folds=8, note="sliding window"),
    "Qwen2": Family("Qwen2ForCausalLM", GATED, folds=8, note="biases of q, k and v"),
    "Qwen3": Family("Qwen3ForCausalLM", {**GATED, "head_dim": 16, "tie_word_embeddings": True}, folds=8),
    "Gemma": Family("GemmaForCausalLM", {**GATED, "head_dim": 16}, folds=8, note="tied embeddings"),
    "Gemma 2": Family("Gemma2ForCausalLM", {**GATED, "head_dim": 16, "sliding_window": 8}, folds=8),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        {**GATED, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        folds=8, note="sliding and full attention in turn",
    ),
    "Gemma 3, images": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**GATED, "head_dim": 16, "sliding_window": 8}, "vision_config": VISION,
            "mm_tokens_per_image": 4, "image_token_index": 250, "boi_token_index": 251, "eoi_token_index": 252,
        },
        folds=8, not_run=("vision_tower",),
        note="the image tower is rounded to nearest: text does not reach it; `--skip vision_tower` leaves it",
    ),
    "Phi-3": Family("Phi3ForCausalLM", GATED, folds=8, note="fused q, k, v and gate, up"),
    "Phi": Family("PhiForCausalLM", GATED, folds=4, note="attention and MLP side by side"),
    "OPT": Family("OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}, folds=8),
    "OPT-350m": Family(
        "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, folds=4,
        note="norms behind attention and MLP",
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64, "bos_token_id": None,
            "eos_token_id": None, "initializer_range": 0.1,
        },
        folds=6, note="Conv1D",
    ),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", {**TINY, "intermediate_size": 48}, folds=6, since="5.23"),
    "Falcon 7B": Family(
        "FalconForCausalLM", {**FALCON, "multi_query": True, "parallel_attn": True}, folds=4,
        note="side by side behind one norm",
    ),
    "Falcon 40B": Family(
        "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, folds=6,
        note="side by side behind two norms",
    ),
    "Falcon RW": Family(
        "FalconForCausalLM", {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}, folds=6,
        note="one after the other",
    ),
    "Bloom": Family(
        "BloomForCausalLM",
        {
            "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 256, "bos_token_id": None, "eos_token_id": None,
            "initializer_range": 0.1,
        },
        folds=6,
    ),
    "StableLM": Family("StableLmForCausalLM", {**GATED, "use_qkv_bias": True}, folds=8),
    "StableLM 2 12B": Family("StableLmForCausalLM", {**GATED, "use_parallel_residual": True}, folds=6),
    "OLMo 2": Family("Olmo2ForCausalLM", GATED, folds=4, note="no norm in front of attention and MLP"),
    "StarCoder2": Family("Starcoder2ForCausalLM", GATED, folds=6),
    "Mixtral": Family("MixtralForCausalLM", EXPERTS, coverage=99.4, folds=12, since="5.23"),
    "Qwen2-MoE": Family(
        "Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 16}, coverage=98.8, folds=14
    ),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 8}, coverage=98.6, folds=12),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        {
            **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8,
        },
        coverage=99.4, folds=15, note="latent attention, a shared expert, a first block without experts",
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM", {**EXPERTS, "head_dim": 8, "sliding_window": 8}, coverage=99.4, folds=4, since="5.16"
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        {
            **EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        coverage=97.9, folds=13, note="hybrid: linear and full attention; convolutions stay",
    ),
    "Jamba": Family(
        "JambaForCausalLM",
        {
            **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "mamba_d_state": 4,
        },
        coverage=98.1, folds=9, not_run=("dt_proj",), since="5.23",
        note="hybrid: state space and attention; convolutions and A stay; dt_proj is rounded to nearest",
    ),
    "Mamba": Family(
        "MambaForCausalLM", STATE_SPACE, coverage=93.1, folds=2, not_run=("dt_proj",), since="5.16",
        note="convolutions and A stay (1 % at real sizes); dt_proj is rounded to nearest: it is read, not run",
    ),
    "Mamba 2": Family(
        "Mamba2ForCausalLM", {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1}, coverage=95.9, folds=4,
        note="convolutions stay",
    ),
    "Granite 4": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **GATED, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4,
        },
        coverage=98.5, folds=8, note="hybrid: state space and attention; convolutions stay",
    ),
    "LFM2": Family(
        "Lfm2ForCausalLM",
        {**GATED, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_auto_adjust_ff_dim": False},
        coverage=99.4, note="hybrid: convolution and attention; convolutions stay",
    ),
    "BERT": Family("BertForMaskedLM", {**TINY, "intermediate_size": 48}, folds=2, note="encoder"),
    "BERT, no head": Family("BertModel", {**TINY, "intermediate_size": 48}, folds=2, note="encoder"),
    "ModernBERT": Family(
        "ModernBertForMaskedLM",
        {
            **TINY, "intermediate_size": 48, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0,
            "cls_token_id": 1, "sep_token_id": 2,
        },
        note="encoder",
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 256,
            "decoder_start_token_id": 0, "eos_token_id": None,
        },
        coverage=99.3, refused="encoder-decoder", since="5.16",
        note="encoder-decoder; tables of relative positions stay",
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 256,
            "max_position_embeddings": 64, "init_std": 0.1, "bos_token_id": 1, "eos_token_id": None,
            "forced_eos_token_id": None,
        },
        refused="encoder-decoder", note="encoder-decoder",
    ),
}  # fmt: skip

HEAD = """# Models

Blocks and their linears are found by walking the model, so a family that is not listed is likely to work too: `afpq
quantize MODEL OUT --dry-run` tells what would be quantized, and names what would not. A linear of a class with a
forward of its own (a router that returns two tensors, a scaled linear of trusted code) stays as it is, and is named
with that reason. Models of images and sound (ViT, CLIP, SigLIP, Whisper, wav2vec2, MusicGen) are rounded to nearest;
methods that need text refuse them.

This table is made of what `tests/test_families.py` holds to be true (`python tests/families.py`): a small random model
of each family is quantized by each method, loaded, compared with the float model of the same weights unpacked, and
generates; saved by `save_pretrained` and loaded again it gives the same bits; it loads in bfloat16; quantized while it
is loaded, it is the same as quantized before. Encoders are loaded and compared, but have no perplexity.

*rtn, gptq, awq*: `--method`. For awq the number of places in the model's two blocks where channel scales can be moved
into a norm or another linear; where there are none, weights are only clipped. *On load*:
`quantization_config=AfpqConfig(...)`. *Coverage*: the quantized share of the blocks' weights, of a tiny model; what
stays is small, and smaller in a real one.
"""


def table_text() -> str:
    """The page, as Markdown."""
    from afpq.evaluation.tables import table

    header = ("family", "architecture", "rtn", "gptq", "awq", "on load", "coverage", "notes")
    rows = [(name, f"`{family.architecture}`", *_cells(family)) for name, family in FAMILIES.items()]
    return f"{HEAD}\n{table(header, rows)}\n"


def _cells(family: Family) -> tuple[str, ...]:
    if family.pending:
        return ("no", "no", "no", "no", "", f"not yet: {family.pending}")
    scaled = f"yes, {family.folds} folds" if family.folds else "clips only"
    gptq, awq = ("no", "no") if family.refused else ("yes", scaled)
    since = "" if family.since == Family.since else f"Transformers {family.since} or newer"
    return ("yes", gptq, awq, "yes", f"{family.coverage:.1f} %", "; ".join(filter(None, (family.note, since))))


def slow_but_for(quick: Collection[str], without: Collection[str]) -> list[Any]:
    """All families but some, for parametrize; those that are not `quick` are of the slow stage."""
    names = [name for name in FAMILIES if name not in without]
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


CHEAP_TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(600))

# Cheap settings: what is tested here is the way through a model, not the figures.
CHEAP = {
    "text": CHEAP_TEXT,
    "settings": afpq.CalibrationSettings(samples=4, seq_len=16),
    "scale_search": "absmax",
}


def random_model(family: Family) -> Any:
    """With norms and biases that are no ones and zeros either, so that none can be overlooked."""
    architecture = getattr(transformers, family.architecture, None)
    if architecture is None or Version(transformers.__version__) < Version(family.since):
        pytest.skip(f"this Transformers has no {family.architecture}")
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**family.config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "A_log" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


if __name__ == "__main__":
    TABLE.write_text(table_text(), "utf-8")
