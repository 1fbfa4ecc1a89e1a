# SPDX-License-Identifier: MIT
"""Small families of models and windows of random tokens, for tests of gradients through a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES
from torch import Tensor, nn

WINDOWS = torch.randint(0, 240, (6, 24), generator=torch.Generator().manual_seed(0))

CPU = torch.device("cpu")


def save(name: str, directory: Path) -> Any:
    """Save a random model of a family; returns the model."""
    family = FAMILIES[name]
    kind = getattr(transformers, family.architecture)
    torch.manual_seed(0)
    model = kind(kind.config_class(**family.config)).eval()
    model.save_pretrained(directory)
    return model


def losses(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """Yield for each window the sum of -log p(y), y drawn from the predictions p, through the whole model."""
    generator = torch.Generator().manual_seed(seed)
    for window in WINDOWS:
        logits = model(window[None], use_cache=False).logits[0].float()
        drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
        yield nn.functional.cross_entropy(logits, drawn, reduction="sum")
