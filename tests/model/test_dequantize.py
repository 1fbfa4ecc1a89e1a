# SPDX-License-Identifier: MIT
"""A loaded quantized model turned back into an ordinary one: same function, same files as any model, no trace of us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, logits_without_afpq
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from afpq import AfpqConfig, AfpqError, AfpqLinear, parse_scheme, quantize

IDS = torch.arange(0, 240, 5).view(2, 24)
WEIGHTS = "model.safetensors"
QWEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True,
}  # fmt: skip
on_loading = pytest.mark.skipif(
    not hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"),
    reason="the first 5.x keep to a saved config",
)


def load(directory: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def assert_ordinary(model: Any) -> None:
    assert not any(isinstance(module, AfpqLinear) for module in model.modules())
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "_is_quantized")
    assert getattr(model, "hf_quantizer", None) is None and not model.is_quantized
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases and tied embeddings, one layer of it stored otherwise."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    place = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model.to(torch.bfloat16).save_pretrained(place / "model")
    quantize(place / "model", place / "out", overrides=(("down_proj", parse_scheme("int4-asym-g32")),))
    return place / "out"


def test_the_function_stays_the_same(saved: Path) -> None:
    model = load(saved)
    expected, names = logits(model), dict(model.named_parameters()).keys()
    plain = model.dequantize()
    assert plain is model
    assert_ordinary(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert len(dict(model.named_parameters()).keys() - names) == 14  # the weights, beside biases and all else
    assert not any(module.training for module in model.modules())


def test_every_weight_is_what_the_file_says(saved: Path) -> None:
    quantized, plain = load(saved), load(saved).dequantize()
    for name, layer in quantized.named_modules():
        if isinstance(layer, AfpqLinear):
            linear = plain.get_submodule(name)
            assert torch.equal(linear.weight, layer.dequantize())
            assert (linear.bias is None) == (layer.bias is None)
            assert layer.bias is None or torch.equal(linear.bias, layer.bias)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_model_computes_in_the_dtype_asked_for(saved: Path, loaded: torch.dtype, dtype: torch.dtype | None) -> None:
    model = load(saved, loaded)
    expected = logits(model)
    model.dequantize(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or loaded}
    assert model.config.dtype == (dtype or loaded)
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()


def test_a_cast_model_keeps_its_dtype(saved: Path) -> None:
    model = load(saved).to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.dequantize().parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


def test_tensors_in_another_dtype_than_the_model_s_keep_it(saved: Path) -> None:
    model = load(saved, torch.bfloat16)
    norm = model.model.norm
    norm.weight.data = norm.weight.data.float()
    assert model.dequantize(torch.float16).model.norm.weight.dtype == torch.float32


def test_the_embeddings_stay_tied(saved: Path, tmp_path: Path) -> None:
    model = load(saved).dequantize(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)


def test_what_is_saved_loads_without_afpq(saved: Path, tmp_path: Path) -> None:
    model = load(saved).dequantize()
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    tensors = load_file(tmp_path / "plain" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(logits_without_afpq(tmp_path / "plain", tmp_path), expected)


def test_it_can_be_trained_and_quantized_again(saved: Path, tmp_path: Path) -> None:
    model = load(saved).dequantize().train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", tmp_path / "again", "nf4-asym-g64")
    assert logits(load(tmp_path / "again")).isfinite().all()


def test_a_model_quantized_on_loading(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir, quantization_config=AfpqConfig(bits=3))
    expected = logits(model)
    assert_ordinary(model.dequantize())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_too_large_is_named_and_the_model_left_as_it_was(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    tensors = {name: tensor.float() for name, tensor in load_file(tmp_path / "model" / WEIGHTS).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    quantize(tmp_path / "model", tmp_path / "out", "nf4-asym-g64-float32", evaluate=False)
    model = load(tmp_path / "out")
    expected = logits(model)
    with pytest.raises(AfpqError, match=r"model\.layers\.1\.mlp\.up_proj.*float16"):
        model.dequantize(torch.float16)
    assert torch.equal(logits(model), expected) and model.is_quantized
    assert logits(model.dequantize(torch.bfloat16)).isfinite().all()


def test_an_offloaded_weight_is_refused(saved: Path) -> None:
    model = load(saved)
    layer = model.model.layers[1].mlp.up_proj
    layer.qweight = layer.qweight.to("meta")
    with pytest.raises(AfpqError, match=r"layers\.1\.mlp\.up_proj.*offload"):
        model.dequantize()


def test_hooks_that_move_inputs_stay(saved: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):  # type: ignore[misc, name-defined]
        calls = 0

        def pre_forward(self, module: nn.Module, *arguments: Any, **named: Any) -> Any:
            self.calls += 1
            return arguments, named

    model, hook = load(saved), Count()
    hooks.add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
    expected = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert hook.calls == 2


@on_loading
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # Transformers', for every method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_on_loading(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = load(saved, dtype).dequantize()
    model = load(saved, dtype, quantization_config=AfpqConfig(dequantize=True))
    assert_ordinary(model)
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_without_the_wish_the_saved_config_is_what_counts(saved: Path) -> None:
    model = load(saved, quantization_config=AfpqConfig(bits=3))
    assert model.model.layers[0].mlp.up_proj.scheme == load(saved).model.layers[0].mlp.up_proj.scheme


def test_the_wish_is_not_saved_with_a_config() -> None:
    assert "dequantize" not in AfpqConfig().to_dict()
    assert AfpqConfig.from_dict({**AfpqConfig().to_dict(), "dequantize": True}).dequantize


def test_dequantize_of_a_model_that_is_not_quantized_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="dequantize"):
        load(tiny_model_dir, quantization_config=AfpqConfig(dequantize=True))
