# SPDX-License-Identifier: MIT
"""What a quantized checkpoint lacks is an error, unless it is the head of a new task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_config, edit_weights, save_tied_qwen2
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
)

import afpq
from afpq import AfpqError


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("missing") / "out"
    afpq.quantize(tiny_model_dir, out, skip=("o_proj",))
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def load(directory: Path, kind: Any = AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(directory, dtype=torch.float32)


NORM, EMBEDDING = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"
KEPT = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
@pytest.mark.parametrize("name", [NORM, EMBEDDING, KEPT, "model.norm.weight"])
def test_a_missing_tensor_of_the_saved_model_is_named(copied: Path, name: str, kind: Any) -> None:
    edit_weights(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(AfpqError, match=name.removeprefix("model.").replace(".", r"\.")):
        load(copied, kind)


def test_a_missing_head_is_an_error_of_the_model_that_has_one(copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(AfpqError, match=r"lm_head\.weight"):
        load(copied)
    assert load(copied, AutoModel).norm.weight.isfinite().all()


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_the_head_of_a_new_task_is_made_as_ever(written: Path, kind: Any) -> None:
    model = load(written, kind)
    assert model.score.weight.isfinite().all() and float(model.score.weight.detach().std()) > 0


def test_a_new_head_is_saved_with_the_model_and_missed_from_then_on(written: Path, tmp_path: Path) -> None:
    load(written, AutoModelForSequenceClassification).save_pretrained(tmp_path)
    again = load(tmp_path, AutoModelForSequenceClassification)
    assert torch.equal(again.score.weight, load(tmp_path, AutoModelForSequenceClassification).score.weight)
    assert load(tmp_path).lm_head.weight.isfinite().all()  # of a classifier, a language model's head is the new one
    edit_weights(tmp_path, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(AfpqError, match=r"score\.weight"):
        load(tmp_path, AutoModelForSequenceClassification)


def test_an_architecture_that_transformers_does_not_have(copied: Path) -> None:
    """Only the base model is then known to have been saved."""
    edit_config(copied, architectures=["TheirOwnForCausalLM"])
    assert load(copied, AutoModelForSequenceClassification).score.weight.isfinite().all()
    edit_weights(copied, lambda tensors: tensors.pop(NORM))
    with pytest.raises(AfpqError, match="input_layernorm"):
        load(copied, AutoModelForSequenceClassification)


@pytest.mark.parametrize("embedding", [False, True])
def test_tied_weights_are_not_missed(tmp_path: Path, embedding: bool) -> None:
    save_tied_qwen2(tmp_path / "model")
    afpq.quantize(tmp_path / "model", tmp_path / "out", embedding=embedding)
    assert load(tmp_path / "out").lm_head(torch.ones(1, 64)).isfinite().all()


def test_an_encoder_with_a_head_that_is_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    afpq.quantize(tmp_path / "model", tmp_path / "out")
    assert load(tmp_path / "out", BertForMaskedLM).cls.predictions.bias.isfinite().all()
    assert load(tmp_path / "out", AutoModelForSequenceClassification).classifier.weight.isfinite().all()
    edit_weights(tmp_path / "out", lambda t: t.pop("bert.embeddings.LayerNorm.weight"))
    with pytest.raises(AfpqError, match=r"embeddings\.LayerNorm\.weight"):
        load(tmp_path / "out", AutoModelForSequenceClassification)


def test_a_float_checkpoint_is_for_transformers_to_judge(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, lambda tensors: tensors.pop(NORM))
    assert load(tiny_copy).model.norm.weight.isfinite().all()
