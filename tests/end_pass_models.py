# SPDX-License-Identifier: MIT
"""A quantized model with its original, and windows of random tokens, for the end pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq import Recipe, parse_scheme
from afpq.evaluation.loading import load_model
from afpq.model.quantize_in_memory import quantize_model


def random_windows(count: int, vocabulary: int = 256, length: int = 24) -> Tensor:
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(3))


def pair(directory: Path, scheme: str) -> tuple[Any, Any]:
    """(quantized, float)."""
    return quantize_model(load_model(directory), Recipe(parse_scheme(scheme))), load_model(directory)


def vectors_of(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: torch.float32 for name, p in model.named_parameters() if p.dim() == 1}
