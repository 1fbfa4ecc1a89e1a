# SPDX-License-Identifier: MIT
"""The places of each model family where AWQ's channel scales can be folded in without changing the block's function.

Linears that read x may read x / s instead if their columns are multiplied by s; x / s costs nothing if the channels of
what produces x can be divided by s: a norm's weight and bias, or the rows and bias of an earlier linear.
Two conditions: every reader of that norm or linear is among the linears (the residual stream is a reader too), and what
lies between commutes with a scale per channel. Attention commutes with scales of v, whatever is done to q and k (norms,
rotations, soft caps), since its scores do not depend on v. A gated MLP, act(gate) * up, commutes with scales of up, not
of gate. ReLU commutes with positive scales, GELU does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Fold:
    """One place to fold scales into; names are those of modules inside the block.

    `previous`, a norm or a linear, produces the input of the `linears`, its only readers. `inside` is the module whose
    output error decides about the scales, "" the block. `layout`: which rows of `previous` feed the linears' columns:

    - "same": row i feeds column i
    - "v": the rows are v's heads, each of which several query heads may share (grouped-query attention)
    - "qkv": rows of q, then k, then v
    - "heads": for every head of k and v, the rows of its query heads, of k, of v
    - "k_v": for every head, the rows of k (without its rotated part), then of v
    - "gate_up": rows of gate, then up

    `plus_one`: the norm multiplies by 1 + weight. `when`: attributes of the block and the values
    that the fold requires; an absent attribute counts as None.
    """

    previous: str
    linears: tuple[str, ...]
    inside: str
    layout: str = "same"
    plus_one: bool = False
    when: tuple[tuple[str, object], ...] = ()


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NORM_QKV = Fold("input_layernorm", QKV, "self_attn")
V_O = Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "v")
NORM_MLP = Fold("post_attention_layernorm", GATE_UP, "mlp")
UP_DOWN = Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")

# Also for mixtures of experts: their norm feeds the router and all experts, which no fold here lists; the two folds of
# a plain MLP do not apply because its linears do not exist. Inside an expert there is one fold.
LLAMA = (NORM_QKV, V_O, NORM_MLP, UP_DOWN)

# Gemma's norms multiply by 1 + weight. From Gemma 2 on, norms named post_* feed the residual stream alone: no folds.
GEMMA = tuple(replace(fold, plus_one="norm" in fold.previous) for fold in LLAMA)
GEMMA2 = tuple(replace(f, previous=f.previous.replace("post_attention", "pre_feedforward")) for f in GEMMA)

# No norms in front: attention and MLP read the residual stream itself.
OLMO2 = (V_O, UP_DOWN)

PHI3 = (
    replace(NORM_QKV, linears=("self_attn.qkv_proj",)),
    replace(V_O, previous="self_attn.qkv_proj", layout="qkv"),
    replace(NORM_MLP, linears=("mlp.gate_up_proj",)),
    replace(UP_DOWN, previous="mlp.gate_up_proj", layout="gate_up"),
)

# Without its second norm, attention and MLP are parallel and read the first.
STABLELM = (
    replace(NORM_QKV, linears=QKV + GATE_UP, inside="", when=(("use_parallel_residual", True),)),
    replace(NORM_QKV, when=(("use_parallel_residual", False),)),
    V_O,
    NORM_MLP,
    UP_DOWN,
)

# From here on no fold between the MLP's two linears, since GELU is between them; except in OPT, which has ReLU.
PHI = (
    Fold("input_layernorm", (*QKV, "mlp.fc1"), ""),
    Fold("self_attn.v_proj", ("self_attn.dense",), "self_attn.dense", "v"),
)

STARCODER2 = (NORM_QKV, V_O, replace(NORM_MLP, linears=("mlp.c_fc",)))

# OPT-350m has its norms after attention and MLP, so the residual stream reads them.
OPT = (
    Fold("self_attn_layer_norm", QKV, "self_attn", when=(("do_layer_norm_before", True),)),
    Fold("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "v"),
    Fold("final_layer_norm", ("fc1",), "fc1", when=(("do_layer_norm_before", True),)),
    Fold("fc1", ("fc2",), "fc2", when=(("activation_fn.__class__", nn.ReLU),)),
)

# Attention and MLP in parallel or in sequence: each has its own norm either way.
GPT_NEOX = (
    Fold("input_layernorm", ("attention.query_key_value",), "attention"),
    Fold("attention.query_key_value", ("attention.dense",), "attention.dense", "heads"),
    Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp"),
)

# One option sends the norms' outputs to the residual stream too.
FUSED, UP, DENSE = "self_attention.query_key_value", "mlp.dense_h_to_4h", "self_attention.dense"
NORMS_INSIDE = (("apply_residual_connection_post_layernorm", False),)
BLOOM = (
    Fold("input_layernorm", (FUSED,), "self_attention", when=NORMS_INSIDE),
    Fold(FUSED, (DENSE,), DENSE, "heads"),
    Fold("post_attention_layernorm", (UP,), "mlp", when=NORMS_INSIDE),
)

# Three arrangements: parallel after one norm (7B, 11B), parallel after two (40B, 180B), in sequence (RW).
FALCON = (
    Fold("input_layernorm", (FUSED, UP), "", when=(("config.parallel_attn", True),)),
    Fold("input_layernorm", (FUSED,), "self_attention", when=(("config.parallel_attn", False),)),
    Fold("ln_attn", (FUSED,), "self_attention"),
    Fold(FUSED, (DENSE,), DENSE, "heads"),
    Fold("ln_mlp", (UP,), "mlp"),
    Fold("post_attention_layernorm", (UP,), "mlp"),
)

GPT2 = (
    Fold("ln_1", ("attn.c_attn",), "attn"),
    Fold("attn.c_attn", ("attn.c_proj",), "attn.c_proj", "qkv"),
    Fold("ln_2", ("mlp.c_fc",), "mlp"),
)

# A shared expert is a plain MLP next to the others: scales can be folded inside it, but not into its input.
SHARED, SHARED_DOWN = "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"
QWEN2_MOE = (*LLAMA, Fold(SHARED, (SHARED_DOWN,), SHARED_DOWN))

# Latent attention: q, and k with v, each through a small vector with its own norm. Small models have no q_a.
Q_B, KV_A, KV_B = "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"
DEEPSEEK = (
    replace(NORM_QKV, linears=("self_attn.q_a_proj", KV_A)),
    replace(NORM_QKV, linears=("self_attn.q_proj", KV_A)),
    Fold("self_attn.q_a_layernorm", (Q_B,), "self_attn"),
    Fold("self_attn.kv_a_layernorm", (KV_B,), "self_attn"),
    replace(V_O, previous=KV_B, layout="k_v"),
    NORM_MLP,
    UP_DOWN,
    Fold("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",), "mlp.shared_experts.down_proj"),
)

# The norms after attention and MLP feed the residual stream.
BERT = (Fold("attention.self.value", ("attention.output.dense",), "attention.output.dense", "v"),)

# State space layers: their norm feeds one linear; a gated norm inside feeds the last. What lies between mixes channels.
MAMBA = (Fold("norm", ("mixer.in_proj",), "mixer"), Fold("mixer.norm", ("mixer.out_proj",), "mixer.out_proj"))
NORM_MAMBA = (
    Fold("input_layernorm", ("mamba.in_proj",), "mamba"),
    Fold("mamba.norm", ("mamba.out_proj",), "mamba.out_proj"),
)
FEED_FORWARD = (
    Fold("pre_ff_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward"),
    Fold("feed_forward.up_proj", ("feed_forward.down_proj",), "feed_forward.down_proj"),
)
JAMBA = (*NORM_MAMBA, NORM_QKV, V_O, *FEED_FORWARD)
FUSED_MLP, MLP_OUT = "shared_mlp.input_linear", "shared_mlp.output_linear"
GRANITE_HYBRID = (
    *NORM_MAMBA,
    NORM_QKV,
    V_O,
    Fold("post_attention_layernorm", (FUSED_MLP,), "shared_mlp", when=(("has_experts", False),)),
    Fold(FUSED_MLP, (MLP_OUT,), MLP_OUT, "gate_up"),
)
IN_PROJ = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
QWEN3_NEXT = (*GEMMA, Fold("input_layernorm", IN_PROJ, "linear_attn", plus_one=True), *QWEN2_MOE[len(LLAMA) :])

# Class name of a block in Transformers -> folds that may apply.
FAMILIES: dict[str, tuple[Fold, ...]] = {
    "LlamaDecoderLayer": LLAMA,
    "MistralDecoderLayer": LLAMA,
    "MinistralDecoderLayer": LLAMA,
    "MixtralDecoderLayer": LLAMA,
    "Qwen2DecoderLayer": LLAMA,
    "Qwen2MoeDecoderLayer": QWEN2_MOE,
    "Qwen3DecoderLayer": LLAMA,
    "Qwen3MoeDecoderLayer": LLAMA,
    "Qwen3NextDecoderLayer": QWEN3_NEXT,
    "DeepseekV3DecoderLayer": DEEPSEEK,
    "GptOssDecoderLayer": LLAMA,
    "MambaBlock": MAMBA,
    "Mamba2Block": MAMBA,
    "JambaMambaDecoderLayer": JAMBA,
    "JambaAttentionDecoderLayer": JAMBA,
    "GraniteMoeHybridDecoderLayer": GRANITE_HYBRID,
    "BertLayer": BERT,
    "GraniteDecoderLayer": LLAMA,
    "SmolLM3DecoderLayer": LLAMA,
    "GemmaDecoderLayer": GEMMA,
    "Gemma2DecoderLayer": GEMMA2,
    "Gemma3DecoderLayer": GEMMA2,
    "Olmo2DecoderLayer": OLMO2,
    "Olmo3DecoderLayer": OLMO2,
    "Phi3DecoderLayer": PHI3,
    "PhiDecoderLayer": PHI,
    "StableLmDecoderLayer": STABLELM,
    "Starcoder2DecoderLayer": STARCODER2,
    "OPTDecoderLayer": OPT,
    "GPTNeoXLayer": GPT_NEOX,
    "BloomBlock": BLOOM,
    "FalconDecoderLayer": FALCON,
    "GPT2Block": GPT2,
}
