# SPDX-License-Identifier: MIT
"""Models loaded through Transformers: their logits, their schemes, and configs that quantize while loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from afpq import AfpqLinear, quantize

IDS = torch.arange(0, 240, 5).view(2, 24)
WEIGHTS = "model.safetensors"


def load(directory: Path, *, auto: Any = AutoModelForCausalLM, dtype: Any = torch.float32, **options: Any) -> Any:
    return auto.from_pretrained(directory, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def schemes_of(model: nn.Module) -> dict[str, str]:
    return {name: str(m.scheme) for name, m in model.named_modules() if isinstance(m, AfpqLinear)}


@pytest.fixture(scope="module")
def saved(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as nf3-asym-g64, for tests that only read it."""
    out = tmp_path_factory.mktemp("saved") / "nf3"
    quantize(tiny_model_dir, out, "nf3-asym-g64")
    return out


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("nf4-asym-g64-log8", {"bits": 4}),
    ("nf4-asym-g128", {"group_size": 128, "scale_dtype": "float16"}),
    ("nf3-asym-g64-log8", {"format": "nf3"}),
    ("nf3-sym-g32", {"scale_dtype": "float16", "bits": 3, "sym": True, "group_size": 32}),
    ("int4-asym-g32", {"scale_dtype": "float16", "format": "int4", "group_size": 32}),
    ("fp4-asym-g-1", {"scale_dtype": "float16", "format": "fp4", "group_size": -1}),
    ("int8-sym-g64", {"scale_dtype": "float16", "bits": 8, "sym": True, "group_size": 64}),
]
UP = "model.layers.1.mlp.up_proj"
