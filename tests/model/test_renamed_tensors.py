# SPDX-License-Identifier: MIT
"""Names in checkpoints and in models: what Transformers' own loader does, told without loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.reader import TensorInfo, open_checkpoint
from afpq.errors import AfpqError
from afpq.model.renamed_tensors import TensorNames
from afpq.model.unfuse import unfuse

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32, "num_attention_heads": 2}
MOE = {**TINY, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def model_of(model_type: str, **changes: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**MOE, **changes}))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model_type", "leaves"),
    [
        ("mixtral", ("w1", "w3", "w2")),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj")),
        ("gpt_oss", ("gate_proj", "up_proj", "down_proj")),
        ("llama", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_called_as_in_files(model_type: str, leaves: tuple[str, ...]) -> None:
    assert TensorNames(model_of(model_type)).leaves() == leaves


@pytest.mark.parametrize(
    ("model_type", "stored", "in_model"),
    [
        ("mixtral", "block_sparse_moe.experts.11.w1.qweight", "mlp.experts.11.w1.qweight"),
        ("mixtral", "block_sparse_moe.experts.0.w2.weight", "mlp.experts.0.w2.weight"),
        ("mixtral", "block_sparse_moe.gate.weight", "mlp.gate.weight"),
        ("qwen3_moe", "mlp.experts.1.up_proj.scales", "mlp.experts.1.up_proj.scales"),
        ("qwen2_moe", "mlp.shared_expert.up_proj.weight", "mlp.shared_expert.up_proj.weight"),
        ("llama", "mlp.up_proj.weight", "mlp.up_proj.weight"),
    ],
)  # fmt: skip
def test_a_stored_name_becomes_the_models(model_type: str, stored: str, in_model: str) -> None:
    assert TensorNames(model_of(model_type)).in_model(f"model.layers.3.{stored}") == f"model.layers.3.{in_model}"


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


def test_a_module_without_transformers_has_plain_names() -> None:
    assert TensorNames(nn.Linear(2, 2)).in_model("a.experts.0.w1.weight") == "a.experts.0.w1.weight"


def test_a_tensor_of_another_shape_is_named() -> None:
    located = TensorLookup({"model.norm.weight": TensorInfo(torch.float32, (17,), Path("file"))}, model_of("llama"))
    with pytest.raises(AfpqError, match=r"file: tensor model\.norm\.weight is .*\(17,\).*needs .*\(16,\)"):
        located.require("model.norm.weight", torch.float32, (16,))
    with pytest.raises(AfpqError, match=r"tensor model\.other is not in the checkpoint"):
        located.require("model.other", torch.float32, (16,))
