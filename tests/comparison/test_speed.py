# SPDX-License-Identifier: MIT
"""Speed of generation: a ratio of two models in one run, and nothing where it cannot be had. No test asserts a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from afpq.comparison import speed as module
from afpq.comparison.speed import compare_speed
from afpq.evaluation.loading import load_model


@pytest.mark.parametrize("length", [2, 3, 100])
def test_a_model_beside_itself(tiny_model_dir: Path, length: int) -> None:
    model = load_model(tiny_model_dir)
    ratio, rate = compare_speed(model, model, torch.arange(length))
    assert ratio is not None and ratio > 0 and rate is not None and rate > 0
    assert compare_speed(model, None, torch.arange(length))[0] == 1


def test_the_best_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, list[float]] = {"fast": [0.3, 0.1, 0.2], "slow": [0.9, 0.5, 0.4]}
    monkeypatch.setattr(module, "generation_seconds", lambda name, window: times[name].pop())
    assert compare_speed("fast", "slow", torch.arange(4)) == (pytest.approx(4), pytest.approx(10))


def test_a_model_without_a_cache_has_no_speed() -> None:
    class Odd:
        device = torch.device("cpu")

        def __call__(self, ids: Any) -> None: ...

    assert compare_speed(Odd(), None, torch.arange(9)) == (None, None)
