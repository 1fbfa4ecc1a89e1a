# SPDX-License-Identifier: MIT
"""Where a block lets channel scales be folded in without changing its function, per family, as data (AWQ).

Linears that read x may read x / s instead if their columns are multiplied by s; x / s costs nothing where x comes from
something whose channels can be divided by s: a norm's weight and bias, or the rows and bias of an earlier linear.
That holds if (a) everything that reads x is among the linears, the residual stream included, and (b) only operations
that commute with a scale per channel lie between producer and readers. Attention commutes with scales of v, whatever
is done to q and k (norms, rotations, soft caps), since the scores do not depend on v; a gated MLP commutes with scales
of `up` (act(gate) * up), but not of `gate`; ReLU commutes with positive scales, GELU does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError


@dataclass(frozen=True)
class Fold:
    """One fold point; names are those of submodules inside the block.

    `previous` (a norm or a linear) produces the input of all `linears`. `inside` is the module whose output error
    should decide about the scales: "" is the block. `layout` says which rows of `previous` feed the linears' columns:

    - "same": row i feeds column i
    - "v": rows are the heads of v, each of which several query heads may share (grouped-query attention)
    - "qkv": q's rows, k's, v's;  "heads": for each head of k and v: the rows of its q's, of k, of v
    - "gate_up": gate's rows, up's

    `plus_one`: the norm multiplies by 1 + weight. `when`: attributes of the block and what they must be, lest the
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
V_O = Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", "v")
UP_DOWN = Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")
NORM_QKV = Fold("input_layernorm", QKV, "self_attn")
NORM_MLP = Fold("post_attention_layernorm", GATE_UP, "mlp")

LLAMA = (NORM_QKV, V_O, NORM_MLP, UP_DOWN)
# The norms behind attention and MLP (post_*_layernorm) feed the residual stream alone: no fold points.
SANDWICH = (NORM_QKV, V_O, replace(NORM_MLP, previous="pre_feedforward_layernorm"), UP_DOWN)
# Gemma's norms multiply by 1 + weight. They must come first in a family: see `plus_one`.
GEMMA = tuple(replace(fold, plus_one="norm" in fold.previous) for fold in LLAMA)
GEMMA2 = tuple(replace(fold, plus_one="norm" in fold.previous) for fold in SANDWICH)
# No norm in front of attention and MLP: they read the residual stream itself.
OLMO2 = (V_O, UP_DOWN)
PHI3 = (
    Fold("input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
    Fold("self_attn.qkv_proj", ("self_attn.o_proj",), "self_attn.o_proj", "qkv"),
    Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
    Fold("mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj", "gate_up"),
)
# Attention and MLP side by side read one norm, so all five scale together; with two norms it is a Llama.
STABLELM = (
    replace(NORM_QKV, linears=QKV + GATE_UP, inside="", when=(("post_attention_layernorm", None),)),
    replace(NORM_QKV, when=(("use_parallel_residual", False),)),
    V_O,
    NORM_MLP,
    UP_DOWN,
)
# Phi: one norm for both. No fold between the MLP's linears: GELU.
PHI = (
    Fold("input_layernorm", (*QKV, "mlp.fc1"), "", when=(("self_attn.qk_layernorm", False),)),
    Fold("self_attn.v_proj", ("self_attn.dense",), "self_attn.dense", "v"),
)
# Norms only where they stand in front (all but OPT-350m: there they feed the residual stream too); fc1 -> fc2 since
# the activation is ReLU.
OPT = (
    Fold("self_attn_layer_norm", QKV, "self_attn", when=(("do_layer_norm_before", True),)),
    Fold("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj", "v"),
    Fold("final_layer_norm", ("fc1",), "fc1", when=(("do_layer_norm_before", True),)),
    Fold("fc1", ("fc2",), "fc2", when=(("activation_fn.__class__", nn.ReLU),)),
)
