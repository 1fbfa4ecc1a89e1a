# SPDX-License-Identifier: MIT
"""Folds are found where they fit, and change no function; bad scales, rounding and shared rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fold_models import blocks_of, change, logits, original, random_scales
from fold_models import float64 as float64  # the fixture
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from afpq.errors import AfpqError
from afpq.model.apply_folds import apply_fold, fold_weights, folds_of, shared_mean
from afpq.model.awq_folds import Fold
from afpq.model.experts import AfpqExperts


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
