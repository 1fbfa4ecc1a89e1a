# SPDX-License-Identifier: MIT
"""Small families of models and windows of random tokens, for tests of gradients through a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES
from torch import Tensor, nn

from afpq.calibration.backward import FloatModelPass, GradientHook
from afpq.calibration.linear_hooks import LinearStatistics, recording
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.blocks import Block
from afpq.model.skeleton import build_skeleton
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

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


def walk(directory: Path, scratch: Path) -> dict[str, LinearStatistics]:
    """Record the statistics of all linears, by full names, a block at a time."""
    checkpoint, skeleton = open_checkpoint(directory), build_skeleton(directory)
    plan = make_plan(checkpoint, skeleton, Recipe(parse_scheme("nf4-asym-g32-log8")))
    passes = FloatModelPass(plan, skeleton, WINDOWS, scratch, CPU, lambda *_: None)
    passes.forwards()
    taps: dict[str, LinearStatistics] = {}
    found: dict[str, LinearStatistics] = {}

    def hook_for(block: Block) -> GradientHook:
        found.clear()
        wanted = {target.module for target in plan.block_targets}
        names = [name.removeprefix(f"{block.name}.") for name, _ in block.linears() if name in wanted]
        return partial(recording, names, WINDOWS.shape, names, found)

    for block in passes.backwards(3, hook_for):
        taps |= {f"{block.name}.{name}": tap for name, tap in found.items()}
    return taps
