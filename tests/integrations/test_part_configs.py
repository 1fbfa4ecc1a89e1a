# SPDX-License-Identifier: MIT
"""One tower of a quantized two-tower model is quantized too, and has the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
)

from afpq import AfpqConfig, AfpqLinear
from afpq.integrations.part_configs import with_parts

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {
    "text_config": {**TOWER, "vocab_size": 256, "max_position_embeddings": 64, "projection_dim": 32},
    "vision_config": {**TOWER, "image_size": 16, "patch_size": 4, "projection_dim": 32},
}
IDS, PIXELS = torch.arange(3, 243, 5).view(2, 24), torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-tower model, quantized; and the float model it was, next to it."""
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**TOWERS, projection_dim=32)).save_pretrained(place / "float")
    config = AfpqConfig(group_size=16)
    CLIPModel.from_pretrained(place / "float", quantization_config=config).save_pretrained(place / "quantized")
    return place / "quantized"


def load(directory: Path, kind: Any) -> tuple[Any, Any]:
    return kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "kind", [CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel, CLIPForImageClassification]
)
def test_a_tower_is_loaded_as_from_the_float_checkpoint(kind: Any, saved: Path, tmp_path: Path) -> None:
    model, found = load(saved, kind)
    _, expected = load(saved.parent / "float", kind)
    assert found["missing_keys"] == expected["missing_keys"]
    assert sum(isinstance(module, AfpqLinear) for module in model.modules()) == 12
    whole = load(saved, CLIPModel)[0].eval()
    text = kind in (CLIPTextModel, CLIPTextModelWithProjection)
    given: Any = {"input_ids": IDS} if text else {"pixel_values": PIXELS}
    right = (whole.text_model if text else whole.vision_model)(**given).last_hidden_state
    if kind is not CLIPForImageClassification:
        assert torch.equal(model.eval()(**given).last_hidden_state, right)
    model.save_pretrained(tmp_path / "tower")
    again, found = load(tmp_path / "tower", kind)
    assert not found["missing_keys"]
    assert torch.equal(again.eval()(**given)[0], model.eval()(**given)[0])


def test_other_configs_are_read_as_they_are() -> None:
    part = {"model_type": "clip_text_model"}
    ours = {"model_type": "clip", "quantization_config": {"quant_method": "afpq"}, "text_config": part}
    assert with_parts(ours, "clip_text_model", "")["text_config"]["quantization_config"] == {"quant_method": "afpq"}
    assert with_parts(ours, "other", "text_config")["text_config"]["quantization_config"] == {"quant_method": "afpq"}
    assert part == {"model_type": "clip_text_model"}
    for config, kind in (
        ({**ours, "quantization_config": {"quant_method": "gptq"}}, "clip_text_model"),
        ({k: v for k, v in ours.items() if k != "quantization_config"}, "clip_text_model"),
        (ours, "clip"),
        (ours, ""),
        (ours, "clip_vision_model"),
    ):
        assert with_parts(config, kind, "vision_config") == config
