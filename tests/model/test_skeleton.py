# SPDX-License-Identifier: MIT
"""A model's architecture without memory for its weights, from any config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import edit_config
from small_models import gpt2, llama, model_of, save
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model
from afpq.model.blocks import conv1d_linears, find_linears
from afpq.model.experts import AfpqExperts
from afpq.model.skeleton import build_skeleton, model_class, read_config


def test_a_config_of_a_million_layers_is_refused_at_once(tiny_copy: Path) -> None:
    config = json.loads((tiny_copy / "config.json").read_text())
    (tiny_copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    for read in (lambda: build_skeleton(tiny_copy), lambda: load_model(tiny_copy, device="cpu")):
        with pytest.raises(AfpqError, match="num_hidden_layers is 1000000"):
            read()


def test_parameters_take_no_memory_and_buffers_are_computed(tmp_path: Path) -> None:
    directory = save(llama(False), tmp_path / "model")
    skeleton, real = build_skeleton(directory), LlamaForCausalLM.from_pretrained(directory)
    assert not skeleton.training and all(p.is_meta and not p.requires_grad for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    buffers = dict(skeleton.named_buffers())
    assert buffers and all(torch.equal(buffer, buffers[name]) for name, buffer in real.named_buffers())


@pytest.mark.parametrize("make", [lambda: gpt2(True), lambda: model_of("mixtral")], ids=["Conv1D", "experts"])
def test_every_matrix_of_a_block_is_a_linear(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert not conv1d_linears(skeleton) and all(linear.weight.is_meta for _, linear in find_linears(skeleton))
    experts = [module for module in skeleton.modules() if isinstance(module, AfpqExperts)]
    assert len(experts) == (2 if "mixtral" in type(skeleton).__name__.lower() else 0)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"hidden_size": -1}, {"model_type": "no_such_model"}])
def test_a_failure_is_one_error_and_leaves_torch_as_it_was(tiny_copy: Path, changes: dict[str, object]) -> None:
    register = nn.Module.register_parameter
    edit_config(tiny_copy, **changes)
    with pytest.raises(AfpqError, match="Transformers cannot build this model") as error:
        build_skeleton(tiny_copy)
    assert str(tiny_copy) in str(error.value) and "\n" not in str(error.value)
    assert nn.Module.register_parameter is register and not nn.Linear(2, 2).weight.is_meta


def test_the_class_is_the_one_that_the_config_names() -> None:
    assert model_class(T5Config(architectures=["T5ForConditionalGeneration"])) is T5ForConditionalGeneration
    for names in (None, [], ["NoSuchModel"], ["AutoTokenizer"], ["logging"]):
        assert model_class(LlamaConfig(architectures=names)) is AutoModelForCausalLM, names


def test_code_of_its_own_is_built_by_the_auto_class_it_is_listed_under() -> None:
    config = LlamaConfig(architectures=["Mine"])
    config.auto_map = {"AutoConfig": "custom.MyConfig", "AutoModel": "custom.Mine", "AutoTokenizer": "custom.Words"}
    assert model_class(config, trust_remote_code=True) is transformers.AutoModel
    assert model_class(config) is AutoModelForCausalLM
    config.auto_map = {"AutoConfig": "custom.Mine"}
    assert model_class(config, trust_remote_code=True) is AutoModelForCausalLM


def test_a_quantized_checkpoint_has_the_skeleton_of_the_float_one(tiny_copy: Path) -> None:
    names = set(build_skeleton(tiny_copy).state_dict())
    edit_config(tiny_copy, quantization_config={"quant_method": "afpq", "version": 1, "bits": 4})
    assert set(build_skeleton(tiny_copy).state_dict()) == names
    assert read_config(tiny_copy).quantization_config
