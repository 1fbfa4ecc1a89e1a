# SPDX-License-Identifier: MIT
"""A checkpoint's tensor is found by the model's name for it, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import model_of

from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.reader import TensorInfo, open_checkpoint
from afpq.errors import AfpqError
from afpq.model.unfuse import unfuse


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama", "bert"])
def test_every_tensor_transformers_saves_is_one_of_the_models(model_type: str, tmp_path: Path) -> None:
    """All but fused experts in one file, which have no name of their own among linears."""
    model = model_of(model_type, first_k_dense_replace=0, n_routed_experts=4, n_group=1, topk_group=1)
    model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path).tensors
    unfuse(model)
    located = TensorLookup(stored, model, model.state_dict())
    state = set(model.state_dict())
    found = {located.find(name) for name in state} - {None}
    assert {name for name in stored if name not in found and "mlp.experts." not in name} == set()
    tied = ("lm_head", "decoder")
    own = [name for name, _ in model.named_parameters() if "experts" not in name and not any(t in name for t in tied)]
    assert own and all(located.find(name) for name in own)


def test_the_base_models_prefix_may_be_missing_or_too_much() -> None:
    model = model_of("llama")
    info = {"model.norm.weight": TensorInfo(torch.float32, (16,), Path("x"))}
    assert TensorLookup(info, model).find("norm.weight") == "model.norm.weight"
    info = {"norm.weight": TensorInfo(torch.float32, (16,), Path("x"))}
    assert TensorLookup(info, model).find("model.norm.weight") == "norm.weight"
    assert TensorLookup(info, model).find("model.other.weight") is None


def test_a_tensor_of_another_shape_is_named() -> None:
    located = TensorLookup({"model.norm.weight": TensorInfo(torch.float32, (17,), Path("file"))}, model_of("llama"))
    with pytest.raises(AfpqError, match=r"file: tensor model\.norm\.weight is .*\(17,\).*needs .*\(16,\)"):
        located.require("model.norm.weight", torch.float32, (16,))
    with pytest.raises(AfpqError, match=r"tensor model\.other is not in the checkpoint"):
        located.require("model.other", torch.float32, (16,))
