# SPDX-License-Identifier: MIT
"""What `afpq info` tells of a checkpoint, against hand counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from afpq import AfpqConfig, AfpqError, parse_scheme, quantize
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import WEIGHTS

BLOCK_WEIGHTS = 2 * (64 * 64 + 32 * 64) + 3 * 64 * 96  # of the tiny model
OUTSIDE_WEIGHTS = 2 * 256 * 64 + 5 * 64  # embeddings, head, five norms
KEYS = {"bits_per_weight", "coverage", "quantized_parameters", "total_parameters", "file_bytes", "layers"}


def test_a_quantized_model_by_hand(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64")
    info = model_info(tmp_path / "out")
    # rows of 64 hold 24 bytes of codes and two scales, the rows of down_proj, 96 long, 36 bytes and four
    stored = (64 + 32 + 32 + 64 + 96 + 96) * (24 + 4) + 64 * (36 + 8)
    assert info.bits_per_weight == pytest.approx(8 * stored / BLOCK_WEIGHTS, rel=1e-12)
    assert info.coverage == 1
    assert info.quantized_parameters == 2 * BLOCK_WEIGHTS
    assert info.total_parameters == 2 * BLOCK_WEIGHTS + OUTSIDE_WEIGHTS
    assert info.file_bytes == (tmp_path / "out" / WEIGHTS).stat().st_size
    assert len(info.layers) == 14
    down = next(layer for layer in info.layers if layer.name == "model.layers.1.mlp.down_proj")
    assert (down.scheme, down.shape) == ("nf3-asym-g64", (64, 96))
    assert down.bits_per_weight == pytest.approx(8 * (36 + 8) / 96)


def test_an_original_model_by_hand(tiny_model_dir: Path) -> None:
    info = model_info(tiny_model_dir)
    assert (info.bits_per_weight, info.coverage, info.quantized_parameters) == (16, 0, 0)
    assert info.total_parameters == 2 * BLOCK_WEIGHTS + OUTSIDE_WEIGHTS
    assert info.file_bytes == (tiny_model_dir / WEIGHTS).stat().st_size
    assert info.layers == [] and info.quantization_config is None


@pytest.mark.parametrize("scheme", ["nf4-asym-g128", "nf2-sym-g32", "int4-asym-g32", "int8-sym-g-1"])
def test_it_agrees_with_the_plan(tiny_model_dir: Path, tmp_path: Path, scheme: str) -> None:
    overrides = (("down_proj", parse_scheme("int8-sym-g32")),)
    plan = quantize(tiny_model_dir, tmp_path / "out", scheme, skip=("q_proj",), overrides=overrides).plan
    info = model_info(tmp_path / "out")
    assert info.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)
    assert info.coverage == pytest.approx(plan.coverage, rel=1e-12)
    assert {(layer.name, layer.scheme) for layer in info.layers} == {(t.module, str(t.scheme)) for t in plan.targets}
    assert info.coverage < 1


def test_a_model_saved_by_transformers(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = AfpqConfig(format="nf3", group_size=64, scale_dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64")
    saved, ours = model_info(tmp_path / "saved"), model_info(tmp_path / "out")
    assert saved.layers == ours.layers
    assert saved.bits_per_weight == ours.bits_per_weight
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and saved.file_bytes == sum(file.stat().st_size for file in files)


def test_json_has_the_agreed_keys(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    for directory in (tiny_model_dir, tmp_path / "out"):
        info = json.loads(json.dumps(model_info(directory).to_json(), allow_nan=False))
        assert set(info) >= KEYS
        assert all({"name", "scheme", "shape", "bits_per_weight"} <= set(layer) for layer in info["layers"])


@pytest.mark.parametrize("keys", [{"quant_method": "gptq", "bits": 4}, "nf4", ["nf4"], 3], ids=str)
def test_a_model_of_another_method_is_an_error(tiny_copy: Path, keys: object) -> None:
    edit_config(tiny_copy, quantization_config=keys)
    with pytest.raises(AfpqError):
        model_info(tiny_copy)


def test_an_unknown_version_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    edit_config(tmp_path / "out", quantization_config={"quant_method": "afpq", "version": 99, "bits": 4})
    with pytest.raises(AfpqError, match="version 99"):
        model_info(tmp_path / "out")


@pytest.mark.parametrize("part", ["qweight", "scales_pos"])
def test_a_missing_or_misshapen_part_is_named(tiny_model_dir: Path, tmp_path: Path, part: str) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    name = f"model.layers.0.self_attn.k_proj.{part}"
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    wrong = torch.zeros(5, 5, dtype=tensors.pop(name).dtype)
    for changed in (tensors, {**tensors, name: wrong}):
        save_file(changed, tmp_path / "out" / WEIGHTS)
        with pytest.raises(AfpqError, match=rf"k_proj\.{part}"):
            model_info(tmp_path / "out")
