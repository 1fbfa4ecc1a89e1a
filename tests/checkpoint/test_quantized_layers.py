# SPDX-License-Identifier: MIT
"""Which layers of a checkpoint are quantized, and in which of its tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from afpq import AfpqConfig, AfpqError, export, parse_scheme, quantize
from afpq.checkpoint.quantized_layers import quantized_layers
from afpq.checkpoint.reader import open_checkpoint


def test_every_layer_with_its_scheme_and_tensors(tiny_model_dir: Path, tmp_path: Path) -> None:
    overrides = (("down_proj", parse_scheme("int8-asym-g32")),)
    plan = quantize(tiny_model_dir, tmp_path / "q", overrides=overrides, skip=("q_proj",), evaluate=False).plan
    checkpoint = open_checkpoint(tmp_path / "q")
    layers = quantized_layers(checkpoint)
    assert {(layer.name, layer.scheme, layer.shape) for layer in layers} == {
        (target.module, target.scheme, target.shape) for target in plan.targets
    }
    for layer in layers:
        assert layer.tensors == {part: f"{layer.name}.{part}" for part in layer.tensors}
        stored = 8 * sum(checkpoint.tensors[name].bytes for name in layer.tensors.values())
        assert layer.size.bits == pytest.approx(stored / layer.elements)
    named = {name for layer in layers for name in layer.tensors.values()}
    assert not any("proj" in name and "q_proj" not in name for name in checkpoint.tensors if name not in named)


def test_a_checkpoint_of_the_model_without_its_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_model_dir, quantization_config=AfpqConfig())
    model.save_pretrained(tmp_path / "base")
    layers = quantized_layers(open_checkpoint(tmp_path / "base"))
    assert len(layers) == 14 and layers[0].tensors["qweight"] == "layers.0.self_attn.q_proj.qweight"
    export(tmp_path / "base", tmp_path / "out")
    again = AutoModel.from_pretrained(tmp_path / "out")
    assert set(again.state_dict()) == set(AutoModel.from_pretrained(tiny_model_dir).state_dict())


def test_a_linear_is_packed_exactly_if_its_packed_tensors_are_there(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One that the config does not keep may have a float weight; one that has neither is an error."""
    quantize(tiny_model_dir, tmp_path / "q", evaluate=False)
    before = quantized_layers(open_checkpoint(tmp_path / "q"))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = []
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert quantized_layers(open_checkpoint(tmp_path / "q")) == before
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(AfpqError, match=r"lm_head\.qweight"):
        quantized_layers(open_checkpoint(tmp_path / "q"))


def test_a_model_that_is_not_quantized_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="not quantized"):
        quantized_layers(open_checkpoint(tiny_model_dir))
