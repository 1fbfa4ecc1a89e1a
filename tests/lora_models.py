# SPDX-License-Identifier: MIT
"""Quantized models with LoRA adapters on them, for tests that need PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import afpq
from afpq import AfpqLinear

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
from afpq.integrations.peft import AfpqLoraLinear  # noqa: E402

IDS = torch.arange(0, 240, 5).view(2, 24)
KINDS = ["nf3-asym-g32", "nf4-asym-g32-log8", "nf4-sym-g16", "int4-asym-g32", "int3-sym-g-1", "fp3-asym-g-1-float32"]
RESULTS = pytest.mark.parametrize("requantize", [False, True], ids=["float", "requantized"])
lossy = pytest.mark.filterwarnings("ignore:rounding the merged weights")  # small random adapters are lost, as it says
again = pytest.mark.filterwarnings("ignore:.*already merged:UserWarning", "ignore:Already following:UserWarning")


@pytest.fixture(scope="module")
def saved(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases in its attention, as nf3-asym-g32, for tests that only read it."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tiny", attention_bias=True)
    afpq.quantize(folder / "tiny", folder / "packed", "nf3-asym-g32")
    return folder / "packed"


def load(directory: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


def adapted(model: Any, *names: str, filled: bool = True, **settings: Any) -> Any:
    """The model with an adapter ("default"), and others of the same settings, that are not zero where `filled`."""
    config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **settings}
    result = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name in names:
        result.add_adapter(name, peft.LoraConfig(**config))
    if filled:
        fill(result)
    return result.eval()


def fill(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(IDS, **options).logits  # type: ignore[no-any-return]


def layers(model: nn.Module) -> dict[str, AfpqLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AfpqLoraLinear)}


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all bytes of all quantized layers, by names without PEFT's parts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AfpqLinear):
            for part, tensor in module.state_dict().items():
                found[f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{part}"] = tensor.clone()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
