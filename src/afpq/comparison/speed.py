# SPDX-License-Identifier: MIT
"""How fast a model generates, as a ratio to another one measured in turns with it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

PROMPT, GENERATED, ROUNDS = 16, 24, 3  # tokens given, tokens generated, and how often


@torch.no_grad()
def generation_seconds(model: Any, window: Tensor) -> float:
    """Measure the seconds for a token of greedy generation after the start of `window`."""
    prompt = window[: max(1, min(PROMPT, len(window) // 2))][None].to(model.device)
    count = max(1, min(GENERATED, len(window) - prompt.shape[1]))
    cache, ids = None, prompt
    for index in range(count + 1):
        if index == 1:  # the prompt is another kind of work
            _wait(model)
            start = time.perf_counter()
        output = model(ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
    _wait(model)
    return (time.perf_counter() - start) / count


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def compare_speed(model: Any, original: Any | None, window: Tensor) -> tuple[float | None, float | None]:
    """Return (how many times as fast as the original the model generates, its tokens per second).

    Both take turns and the best of each counts, for machines are never quiet. Without an original the ratio is 1. Both
    figures are None for a model that does not take and give a cache as most do: no reason to lose its other figures.
    """
    times = []
    try:
        for _ in range(ROUNDS):
            mine = generation_seconds(model, window)
            times.append((mine, mine if original is None else generation_seconds(original, window)))
    except (TypeError, AttributeError, ValueError, KeyError, IndexError, NotImplementedError):
        return None, None
    mine, other = (min(column) for column in zip(*times))
    return other / mine, 1 / mine
