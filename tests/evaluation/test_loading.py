# SPDX-License-Identifier: MIT
"""Loading a model to run it: in its own class and dtype, and one clear error for what cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import edit_config, edit_weights
from small_models import bert, gpt2, llama, save, t5
from torch import nn
from transformers.utils import logging

import afpq
from afpq import AfpqError, AfpqLinear
from afpq.evaluation.loading import (
    context_length,
    generates,
    load_model,
    load_tokenizer,
    quiet_transformers,
    require_next_token,
    window_length,
)


@pytest.mark.parametrize("make", [lambda: llama(True), bert, t5], ids=["decoder", "encoder", "encoder-decoder"])
def test_a_model_is_loaded_as_the_class_its_config_names(tmp_path: Path, make: Any) -> None:
    model = make()
    save(model, tmp_path / "model")  # float16
    loaded = load_model(tmp_path / "model", device="cpu")
    assert type(loaded) is type(model) and not loaded.training
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(p, loaded.get_parameter(name).half()) for name, p in model.named_parameters())


def test_a_quantized_model_keeps_its_scales_and_computes_in_float32(tiny_model_dir: Path, tmp_path: Path) -> None:
    afpq.quantize(tiny_model_dir, tmp_path / "out", "nf4-asym-g32", evaluate=False)
    layer = load_model(tmp_path / "out", device="cpu").model.layers[0].mlp.up_proj
    assert isinstance(layer, AfpqLinear) and layer.scales_pos.dtype == torch.float16 and layer.dtype == torch.float32


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_an_error_and_not_a_random_number(tiny_copy: Path, name: str) -> None:
    edit_weights(tiny_copy, lambda tensors: tensors.pop(name))
    with pytest.raises(AfpqError, match=rf"the checkpoint lacks {name}"):
        load_model(tiny_copy, device="cpu")


@pytest.mark.parametrize("method", ["no_such_method", None, 7, ["afpq"]], ids=str)
def test_an_unknown_quantization_is_named(tiny_copy: Path, method: object) -> None:
    edit_config(tiny_copy, quantization_config={"quant_method": method})
    with pytest.raises(AfpqError, match="which Transformers cannot load here"):
        load_model(tiny_copy, device="cpu")


def test_whatever_transformers_raises_is_one_line_that_names_the_model(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, lambda t: t.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(AfpqError) as error:
        load_model(tiny_copy, device="cpu")
    assert str(tiny_copy) in str(error.value) and "\n" not in str(error.value)
    (tiny_copy / "tokenizer.json").write_text("{")
    with pytest.raises(AfpqError, match="Transformers cannot load it"):
        load_tokenizer(tiny_copy)


def test_perplexity_is_for_what_predicts_the_next_token() -> None:
    require_next_token(llama(True))
    require_next_token(gpt2(True))
    for make in (bert, t5):
        with pytest.raises(AfpqError, match=f"{type(make()).__name__} does not predict the next token"):
            require_next_token(make())
    assert generates(t5()) and not generates(bert())
    assert generates(nn.Linear(2, 2))  # code that is not Transformers' own is trusted to


@pytest.mark.parametrize(
    ("config", "context"),
    [({"max_position_embeddings": 64}, 64), ({}, None), ({"max_position_embeddings": None}, None),
     ({"max_position_embeddings": 1}, None), ({"max_position_embeddings": "long"}, None)],
    ids=str,
)  # fmt: skip
def test_a_window_is_no_longer_than_the_context(config: dict[str, Any], context: int | None) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(**config))
    assert context_length(model) == context
    assert (window_length(model, 32), window_length(model, 100)) == (32, context or 100)


def test_the_context_of_a_model_of_pictures_is_that_of_its_text() -> None:
    text = SimpleNamespace(max_position_embeddings=77)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text, max_position_embeddings=5))
    assert context_length(model) == 77


@pytest.mark.parametrize("bar", [True, False])
def test_transformers_is_as_loud_afterwards_as_before(bar: bool) -> None:
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        (logging.enable_progress_bar if bar else logging.disable_progress_bar)()
        logging.set_verbosity_info()
        with pytest.raises(ZeroDivisionError), quiet_transformers():
            assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.ERROR
            raise ZeroDivisionError
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bar, logging.INFO)
    finally:
        logging.set_verbosity(before[1])
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
