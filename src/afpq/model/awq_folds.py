# SPDX-License-Identifier: MIT
"""Where channel scales can be folded into a block without changing its function: per family, as data (for AWQ).

Linears that read x may read x / s instead if their columns are multiplied by s; x / s costs nothing where x comes from
something whose channels can be divided by s: a norm's weight and bias, or the rows and bias of an earlier linear.
Two things must hold: everything that reads the norm or linear is among the linears (the residual stream is a reader
too), and what lies between commutes with a scale per channel. Attention commutes with scales of v, whatever is done to
q and k (norms, rotations, soft caps), since its scores do not depend on v. A gated MLP, act(gate) * up, commutes with
scales of up, not of gate. ReLU commutes with positive scales, GELU does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError
from afpq.model.experts import Expert


@dataclass(frozen=True)
class Fold:
    """One fold point; names are those of modules inside the block.

    `previous`, a norm or a linear, produces the input of the `linears`, which are all that read it. `inside` is the
    module whose output error should decide about the scales, "" the block. `layout`: which rows of `previous` feed
    the linears' columns:

    - "same": row i feeds column i
    - "v": the rows are v's heads, each of which several query heads may share (grouped-query attention)
    - "qkv": rows of q, then k, then v
    - "heads": for every head of k and v, the rows of its query heads, of k, of v
    - "k_v": for every head, the rows of k (without its rotated part), then of v
    - "gate_up": rows of gate, then up

    `plus_one`: the norm multiplies by 1 + weight. `when`: attributes of the block, and what they must be lest the
    fold be wrong; an absent attribute counts as None.
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

# Also mixtures of experts: their norm feeds the router and all experts, which no fold here lists; where the MLP is
# not a plain one, its two folds fall away because their linears do not exist. Inside of an expert there is one fold.
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

# Without its second norm, attention and MLP stand side by side and read the first.
STABLELM = (
    replace(NORM_QKV, linears=QKV + GATE_UP, inside="", when=(("use_parallel_residual", True),)),
    replace(NORM_QKV, when=(("use_parallel_residual", False),)),
    V_O,
    NORM_MLP,
    UP_DOWN,
)

# From here on no fold between the MLP's two linears, GELU being between them, but in OPT where ReLU is.
PHI = (
    Fold("input_layernorm", (*QKV, "mlp.fc1"), ""),
    Fold("self_attn.v_proj", ("self_attn.dense",), "self_attn.dense", "v"),
)

STARCODER2 = (NORM_QKV, V_O, replace(NORM_MLP, linears=("mlp.c_fc",)))

# OPT-350m has its norms behind attention and MLP, where the residual stream reads them.
OPT = (
    Fold("self_attn_layer_norm", QKV, "self_attn", when=(("do_layer_norm_before", True),)),
    Fold("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "v"),
    Fold("final_layer_norm", ("fc1",), "fc1", when=(("do_layer_norm_before", True),)),
    Fold("fc1", ("fc2",), "fc2", when=(("activation_fn.__class__", nn.ReLU),)),
)

# Attention and MLP side by side, or one after the other: each has its own norm either way.
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

# Three arrangements: side by side behind one norm (7B, 11B), behind two (40B, 180B), one after the other (RW).
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

# A shared expert is a plain MLP beside the others, so what is inside of it can be folded; its input cannot.
SHARED, SHARED_DOWN = "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"
QWEN2_MOE = (*LLAMA, Fold(SHARED, (SHARED_DOWN,), SHARED_DOWN))

# Latent attention: q, and k with v, each by way of a small vector with a norm of its own. Small models have no q_a.
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

# The norms behind attention and MLP feed the residual stream.
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

# Class of a block in Transformers -> folds that may apply.
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


def folds_of(block: nn.Module) -> tuple[Fold, ...]:
    """The folds of a block of Transformers, or of an expert, in the order their linears run; () where none is known.

    Code from elsewhere (`trust_remote_code`) is not known even if its class has a known name.
    """
    if isinstance(block, Expert):
        *_, up, down = block.form.names
        return (Fold(up, (down,), down),) if block.form.linear_in_up else ()
    if not type(block).__module__.startswith("transformers.models."):
        return ()
    return tuple(fold for fold in FAMILIES.get(type(block).__name__, ()) if _fits(block, fold))


def _fits(block: nn.Module, fold: Fold) -> bool:
    if any(_attribute(block, path) != wanted for path, wanted in fold.when):
        return False
    linears = [_attribute(block, name) for name in fold.linears]
    weight = _attribute(block, f"{fold.previous}.weight")
    if not isinstance(weight, Tensor) or not all(isinstance(linear, nn.Linear) for linear in linears):
        return False
    if len({weight.shape[1] for weight in fold_weights(block, fold)}) != 1:
        return False
    rows = producer_rows(block, fold)
    return rows is not None and (fold.layout != "same" or len(rows) == len(weight))


def _attribute(block: nn.Module, path: str) -> object:
    value: object = block
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def fold_weights(block: nn.Module, fold: Fold) -> list[Tensor]:
    """The weights [out, in] of the fold's linears, in its order."""
    return [block.get_parameter(f"{name}.weight") for name in fold.linears]


def producer_rows(block: nn.Module, fold: Fold) -> Tensor | None:
    """int64 [in]: the row of `previous` that feeds each column of the linears; None if the shapes do not fit.

    A row occurs several times where query heads share a head of v.
    """
    rows = len(block.get_parameter(f"{fold.previous}.weight"))
    columns = fold_weights(block, fold)[0].shape[1]
    if fold.layout == "same":
        return torch.arange(columns)
    if fold.layout == "gate_up":
        return torch.arange(columns, 2 * columns) if rows == 2 * columns else None
    attention = block.get_submodule(fold.previous.rpartition(".")[0])
    names = ("v_head_dim",) if fold.layout == "k_v" else ("head_dim", "head_size", "attention_head_size")
    dim = next((d for name in names if isinstance(d := getattr(attention, name, None), int)), None)
    if dim is None:
        return None
    if fold.layout == "k_v":
        each, rest = divmod(rows * dim, columns)  # rows of a head
        first = torch.arange(1, columns // dim + 1) * each - dim
        fits = not rest and columns % dim == 0 and each > dim
        return (first[:, None] + torch.arange(dim)).flatten() if fits else None
    heads = columns // dim  # of q
    shared = rows // dim if fold.layout == "v" else (rows // dim - heads) // 2  # heads of k and of v
    fused = 0 if fold.layout == "v" else heads + shared
    if shared < 1 or heads % shared or heads * dim != columns or (fused + shared) * dim != rows:
        return None
    reads = torch.arange(heads) // (heads // shared)  # the head of v that each query head reads
    first = (reads + 1) * (heads // shared + 2) - 1 if fold.layout == "heads" else reads + fused
    return (first[:, None] * dim + torch.arange(dim)).flatten()


def shared_mean(block: nn.Module, fold: Fold, x: Tensor) -> Tensor:
    """x [in] averaged over the columns that one row of `previous` feeds, which must have one scale. Same shape."""
    rows = _rows(block, fold).to(x.device)
    size = int(rows.max()) + 1
    total = x.new_zeros(size).index_add(0, rows, x)
    return (total / x.new_zeros(size).index_add(0, rows, torch.ones_like(x)))[rows]


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scales: Tensor, saved_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply the linears' columns by `scales` [in] and divide `previous` by them, in place: the function stays.

    A norm is rounded to the dtype of its file (`saved_dtype`; its own by default), and the linears are multiplied
    by what it was really divided by: Gemma's 1 + weight leaves few digits in bfloat16. These scales are returned
    (float32 [in]): the linears' inputs are now smaller by them, and their second moment is H / (s s^T). Raises
    AfpqError for scales that are not positive and finite, or that differ where columns share a row.
    """
    previous = block.get_submodule(fold.previous)
    weight = block.get_parameter(f"{fold.previous}.weight")
    rows, scales = _rows(block, fold).to(weight.device), scales.to(weight.device).double()
    divisor = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    divisor[rows] = scales
    if not bool((torch.isfinite(scales) & (scales > 0)).all()) or not torch.allclose(divisor[rows], scales, rtol=1e-5):
        raise AfpqError(f"scales of {fold.previous} must be positive, finite, and equal where columns share a row")
    if isinstance(previous, nn.Linear):
        _multiply(weight, 1 / divisor[:, None])
    else:
        divisor = _divide_norm(weight, divisor, float(fold.plus_one), saved_dtype or weight.dtype)
    bias = getattr(previous, "bias", None)
    if isinstance(bias, Tensor):
        _multiply(bias, 1 / divisor)
    for readers in fold_weights(block, fold):
        _multiply(readers, divisor[rows])
    return divisor[rows].float()


def _multiply(weight: Tensor, factor: Tensor) -> None:
    """In place. A float64 factor would turn the whole weight into float64 on the way, so it is narrowed."""
    weight.mul_(factor.to(torch.promote_types(weight.dtype, torch.float32)))


def _divide_norm(weight: Tensor, divisor: Tensor, offset: float, saved_dtype: torch.dtype) -> Tensor:
    """Divide offset + weight [in], in place; returns by what each channel was divided once rounded to `saved_dtype`."""
    old = weight.double() + offset
    new = (old / divisor - offset).to(saved_dtype).double() + offset
    new = torch.where((new != 0) & torch.isfinite(new), new, old)  # rounding must not erase a channel
    weight.copy_(new - offset)
    return torch.where(old == 0, divisor, old / new)


def _rows(block: nn.Module, fold: Fold) -> Tensor:
    rows = producer_rows(block, fold)
    if rows is None:
        raise AfpqError(f"{fold.previous} does not have the shape of a fold {fold.layout!r}")
    return rows
