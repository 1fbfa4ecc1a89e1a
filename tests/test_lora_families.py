# SPDX-License-Identifier: MIT
"""LoRA merged into a quantized model of any family, saved and loaded: the logits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, random_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afpq import AfpqConfig, AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.model.dequantize import float_module, packed_module
from afpq.model.quantize_in_memory import quantize_model

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
pytest.importorskip("afpq.integrations.peft", reason="needs PEFT 0.19 or newer")

IDS = torch.arange(3, 243, 10).view(2, 12)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*_pattern keys did not match",
    "ignore:target_parameters=",  # PEFT expects experts in one tensor, which are linears here
    "ignore:rounding the merged weights",
)
REFUSED = ("Mamba", "Mamba 2")  # by PEFT: their code reads a weight past its layer


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder)[0].float()  # type: ignore[no-any-return]


def load(directory: Path, family: str, **options: Any) -> Any:
    kind = getattr(transformers, FAMILIES[family].architecture)
    return kind.from_pretrained(directory, dtype=torch.float32, **options).eval()


def adapted(model: Any) -> Any:
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "FEATURE_EXTRACTION"
    result = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in result.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return result.eval()


@pytest.mark.parametrize("requantize", [False, True], ids=["float", "requantized"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_merged_saved_and_loaded(family: str, requantize: bool, tmp_path: Path) -> None:
    random_model(FAMILIES[family]).save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", family, quantization_config=AfpqConfig(format="nf3", group_size=16))
    plain, wrapped = outputs(model), adapted(model)
    expected = outputs(wrapped)
    assert (expected - plain).abs().max() > 1e-3
    merged = wrapped.merge_and_unload(requantize=requantize)
    if requantize:
        expected = outputs(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", family)
    torch.testing.assert_close(outputs(again), expected, rtol=1e-3, atol=1e-3)
    kinds = {name: type(m) for name, m in merged.named_modules() if isinstance(m, (AfpqLinear, nn.Linear, Conv1D))}
    assert requantize == any(kind is AfpqLinear for kind in kinds.values())
    if requantize:
        merged.dequantize().save_pretrained(tmp_path / "plain")
        torch.testing.assert_close(outputs(load(tmp_path / "plain", family)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_layer_made_of_another_keeps_all_but_the_weight(conv1d: bool, bias: bool) -> None:
    linear = nn.Linear(24, 16, bias)
    model = nn.ModuleDict({"layers": nn.ModuleList([linear])})
    quantize_model(model, Recipe(parse_scheme("nf4-asym-g8")))
    layer: Any = model.get_submodule("layers.0")
    layer.conv1d, layer.readable, layer.dtype = conv1d, False, torch.bfloat16
    layer.eval()
    x = torch.randn(3, 24)
    plain = float_module(layer, layer.dequantize())
    assert type(plain) is (Conv1D if conv1d else nn.Linear) and not plain.training
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-5)
    new = packed_module(layer, layer.quantized_weight())
    assert (new.conv1d, new.readable, new.dtype, new.training) == (conv1d, False, torch.bfloat16, False)
    assert torch.equal(new(x), layer(x))
    if bias:
        shifted = float_module(layer, layer.dequantize(), layer.bias + 1)
        torch.testing.assert_close(shifted(x), layer(x) + 1, rtol=1e-4, atol=1e-5)


EXPERTS = ["Mixtral", "Qwen3-MoE", "gpt-oss"]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_alone_are_merged_whole_or_not_at_all(family: str, tmp_path: Path) -> None:
    random_model(FAMILIES[family]).save_pretrained(tmp_path / "float")

    def wrapped(pattern: str) -> Any:
        model = load(tmp_path / "float", family, quantization_config=AfpqConfig(format="nf3", group_size=16))
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern)).eval()

    every, down = r".*experts\.\d+\.\w+", r".*experts\.\d+\.(w2|down_proj)"
    merged = wrapped(every).merge_and_unload()
    assert any(isinstance(module, AfpqLinear) for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(load(tmp_path / "merged", family)), outputs(merged))
    some = wrapped(down)
    with pytest.raises(AfpqError, match=r"experts: 4 of its 12 linears have an adapter.*requantize=True"):
        some.merge_and_unload()
    some.merge_and_unload(requantize=True)
