# SPDX-License-Identifier: MIT
"""Weights read without a model compute what the loaded model's layers do; rows of them are their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import edit_weights, save_llama, save_tied_qwen2
from torch import Tensor
from transformers import AutoModelForCausalLM

from afpq import AfpqError, kernels, parse_scheme, quantize
from afpq.checkpoint.packed_weights import PackedCheckpoint, open_packed
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.linear import AfpqLinear

# Two scales, one scale, zero points whose rows share bytes (3 bits: eight rows in three), bytes of scales.
SCHEMES = ["nf4-asym-g32", "nf3-sym-g64", "int3-asym-g32", "int4-asym-g32", "nf2-asym-g32-log8", "int8-asym-g32"]


def quantized(directory: Path, scheme: str) -> Path:
    save_llama(directory / "model")
    quantize(directory / "model", directory / "q", scheme, evaluate=False)
    return directory / "q"


def linear(x: Tensor, checkpoint: PackedCheckpoint, name: str, bias: Tensor | None = None) -> Tensor:
    y: Tensor = kernels.linear(x, *checkpoint.weight(name).arguments(bias))
    return y


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_compute_what_the_loaded_model_s_do(scheme: str, tmp_path: Path) -> None:
    directory = quantized(tmp_path, scheme)
    checkpoint = open_packed(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, AfpqLinear)}
    assert modules.keys() == checkpoint.layers.keys() and len(modules) == 14
    for name, module in modules.items():
        layer = checkpoint.layers[name]
        assert (layer.scheme, layer.shape) == (module.scheme, (module.out_features, module.in_features))
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
        y = module(x)
        assert torch.equal(linear(x, checkpoint, name), y)
        for first, last in ((0, module.out_features // 2), (5, 18), (module.out_features - 1, module.out_features)):
            weight = checkpoint.rows(name, first, last)
            assert torch.equal(
                kernels.dequantize(*weight, module.in_features, torch.float32), module.dequantize()[first:last]
            )
            shard = kernels.linear(x, *weight.arguments())
            torch.testing.assert_close(shard, y[:, first:last], rtol=1e-5, atol=1e-5)


def test_all_other_tensors_are_plain_and_the_config_is_there(tmp_path: Path) -> None:
    directory = quantized(tmp_path, "nf4-asym-g32")
    checkpoint, whole = open_packed(directory), open_checkpoint(directory)
    named = {tensor for layer in checkpoint.layers.values() for tensor in layer.tensors.values()}
    assert named | checkpoint.plain.keys() == whole.tensors.keys() and not named & checkpoint.plain.keys()
    assert {"model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"} <= checkpoint.plain.keys()
    assert torch.equal(checkpoint.tensor("model.norm.weight"), whole.read("model.norm.weight"))
    assert checkpoint.config["model_type"] == "llama" and checkpoint.config["quantization_config"]
    with pytest.raises(AfpqError, match=r"no tensor model\.layers\.0\.self_attn\.q_proj\.qweight outside"):
        checkpoint.tensor("model.layers.0.self_attn.q_proj.qweight")


def test_biases_and_a_quantized_embedding(tmp_path: Path) -> None:
    save_tied_qwen2(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "q", "nf4-asym-g32", embedding="nf4-asym-g64", evaluate=False)
    checkpoint = open_packed(tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    name = "model.layers.0.self_attn.q_proj"
    module = model.get_submodule(name)
    x, bias = torch.randn(2, 64), checkpoint.tensor(f"{name}.bias")
    assert bias.any() and torch.equal(linear(x, checkpoint, name, bias), module(x))
    table = checkpoint.layers["model.embed_tokens"]
    assert table.end and table.scheme == parse_scheme("nf4-asym-g64")
    ids = torch.tensor([3, 200])
    rows = torch.cat([
        kernels.dequantize(*checkpoint.rows(table.name, i, i + 1), 64, torch.float32) for i in ids.tolist()
    ])  # fmt: skip
    assert torch.equal(rows, model.get_input_embeddings()(ids).float())


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (3, 3), (5, 2), (0, 65)])
def test_rows_that_a_layer_does_not_have_are_refused(first: int, last: int, tmp_path: Path) -> None:
    checkpoint = open_packed(quantized(tmp_path, "nf4-asym-g32"))
    with pytest.raises(AfpqError, match=rf"q_proj: rows \[{first}, {last}\) of 64"):
        checkpoint.rows("model.layers.0.self_attn.q_proj", first, last)
    with pytest.raises(AfpqError, match="no quantized layer lm_head"):
        checkpoint.weight("lm_head")


def test_errors_name_the_tensor(tmp_path: Path) -> None:
    directory = quantized(tmp_path, "nf4-asym-g32")
    bad, gone = "model.layers.1.mlp.up_proj.scales_neg", "model.layers.0.mlp.up_proj.qweight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[bad][3, 1] = float("inf")

    edit_weights(directory, spoil)
    checkpoint = open_packed(directory)
    with pytest.raises(AfpqError, match=rf"tensor {bad} holds or makes NaN or Inf"):
        checkpoint.weight("model.layers.1.mlp.up_proj")
    assert checkpoint.rows("model.layers.1.mlp.up_proj", 4, 9).qweight.shape[0] == 5  # it has no damaged row

    edit_weights(directory, lambda tensors: tensors.pop(gone))
    with pytest.raises(AfpqError, match=f"tensor {gone} is not in the checkpoint"):
        open_packed(directory)

    (directory / "model.safetensors").unlink()
    with pytest.raises(AfpqError, match=r"model\.safetensors: cannot read tensor model\.layers\.0\.mlp\.down_proj\."):
        checkpoint.weight("model.layers.0.mlp.down_proj")


def test_a_model_that_is_not_quantized_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="not quantized"):
        open_packed(tiny_model_dir)
