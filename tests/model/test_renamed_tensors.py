# SPDX-License-Identifier: MIT
"""Names in checkpoints and in models: what Transformers' own loader does, told without loading."""

from __future__ import annotations

import pytest
from small_models import model_of
from torch import nn

from afpq.model.renamed_tensors import TensorNames


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


def test_a_module_without_transformers_has_plain_names() -> None:
    assert TensorNames(nn.Linear(2, 2)).in_model("a.experts.0.w1.weight") == "a.experts.0.w1.weight"
