# SPDX-License-Identifier: MIT
"""Adapters of a quantized model's experts: all of them, and the same again once they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, random_model
from torch import Tensor

from afpq import AfpqConfig, AfpqLinear

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
pytest.importorskip("afpq.integrations.peft", reason="needs PEFT 0.19 or newer")

IDS = torch.arange(3, 243, 10).view(2, 12)
EXPERTS = ["Mixtral", "Qwen3-MoE", "gpt-oss"]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def quantized(directory: Path, family: str) -> Any:
    kind, config = getattr(transformers, FAMILIES[family].architecture), AfpqConfig(format="nf3", group_size=16)
    return kind.from_pretrained(directory, dtype=torch.float32, quantization_config=config).eval()


@pytest.mark.parametrize("family", EXPERTS)
def test_all_linear_adapts_every_quantized_linear_of_experts_too(family: str, tmp_path: Path) -> None:
    random_model(FAMILIES[family]).save_pretrained(tmp_path / "float")
    model = quantized(tmp_path / "float", family)
    names = {name for name, module in model.named_modules() if isinstance(module, AfpqLinear)}
    plain = outputs(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = {name.removeprefix("base_model.model.") for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert names and layers >= names
    expected = outputs(wrapped)
    assert (expected - plain).abs().max() > 0.01
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(tmp_path / "float", family), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(again), expected)
