# SPDX-License-Identifier: MIT
"""Perplexity and KL for the quality card: on which text, at what cost, and when not at all.

A card's figures are a sample: few windows, so that they never dominate the time. Both models must fit in half of the
free memory; a block-by-block run of a model that does not is not spoiled by loading it whole at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from afpq.checkpoint.plan import Plan, loaded_bytes, original_bytes, vocabulary
from afpq.errors import AfpqError, one_line, out_of_memory
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.evaluation.memory import available_device_memory, available_memory
from afpq.evaluation.perplexity import LOGITS_BATCH_TOKENS, Evaluation, evaluate, logits_of
from afpq.evaluation.text import unused_windows, window_starts, windows
from afpq.progress import Progress

MAX_WINDOWS, MAX_LENGTH = 16, 512


@dataclass(frozen=True)
class CardText:
    """A text: windows of tokens [count, length] to measure on, and what they are, as a phrase."""

    windows: Tensor
    origin: str


@dataclass(frozen=True)
class CardFigures:
    """The original's perplexity and the result's figures, on `sample`."""

    sample: CardText
    original: float
    result: Evaluation

    def to_json(self) -> dict[str, Any]:
        count, length = self.sample.windows.shape
        place = {"text": self.sample.origin, "windows": count, "seq_len": length}
        return {**self.result.to_json(), "original_perplexity": self.original, **place}


@dataclass(frozen=True)
class WindowDraw:
    """A calibration text's tokens [n], and how windows were drawn from it: `count` of `length`, with `seed`."""

    tokens: Tensor
    count: int
    length: int
    seed: int


def card_text_of(tokens: Tensor, length: int, origin: str) -> CardText:
    """Return the first windows of a text that played no part in quantizing. Raises AfpqError if it is too short."""
    return CardText(windows(tokens, min(length, MAX_LENGTH))[:MAX_WINDOWS], origin)


def unused_card_text(drawn: WindowDraw, name: str) -> CardText:
    """Return parts of a calibration text that no calibration window touches; the windows if there are none."""
    length = min(drawn.length, MAX_LENGTH, len(drawn.tokens))
    starts = window_starts(len(drawn.tokens), drawn.count, drawn.length, drawn.seed)
    unused = unused_windows(drawn.tokens, starts, drawn.length, length, MAX_WINDOWS)
    if len(unused):
        return CardText(unused, f"parts of {name} that calibration did not use (the same source: a mild test)")
    used = torch.stack([drawn.tokens[start : start + length] for start in starts[:MAX_WINDOWS]])
    return CardText(used, f"the very windows of {name} it was calibrated on (a flattering test)")


def measure_card_text(
    plan: Plan,
    result: Path,
    sample: CardText,
    device: torch.device,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CardFigures | str:
    """Measure the saved model in `result` against the plan's original, both loaded; or the reason why not."""
    cuda = device.type == "cuda"
    if _needed(plan, cuda) > (available_device_memory(device) if cuda else available_memory()) // 2:
        return "the original and this model together take more than half of the memory that was free"
    losses: list[float] = []
    try:
        with quiet_transformers():
            original = load_model(plan.checkpoint.directory, trust_remote_code, str(device))
            reference = _noting_losses(logits_of(original, sample.windows), sample.windows, losses)
            model = load_model(result, trust_remote_code, str(device))
            figures = evaluate(model, sample.windows, reference, progress)
        return CardFigures(sample, math.exp(sum(losses) / len(losses)), figures)
    except (AfpqError, RuntimeError, MemoryError, OverflowError) as error:
        return one_line(out_of_memory(error) or error, 300)


def _needed(plan: Plan, cuda: bool) -> int:
    """Estimate the bytes of both models, of both batches of logits and of the distributions of a window."""
    logits = 4 * vocabulary(plan) * (2 * LOGITS_BATCH_TOKENS + 8 * MAX_LENGTH)
    if cuda:
        return sum(info.bytes for info in plan.checkpoint.tensors.values()) + plan.output_bytes + logits
    return original_bytes(plan) + loaded_bytes(plan) + logits


def _noting_losses(logits: Iterable[Tensor], windows: Tensor, losses: list[float]) -> Iterator[Tensor]:
    """Yield the logits of each window; each window's mean loss goes to `losses`."""
    for window, scores in zip(windows, logits):
        losses.append(cross_entropy(scores[:-1].float(), window[1:].to(scores.device)).item())
        yield scores
