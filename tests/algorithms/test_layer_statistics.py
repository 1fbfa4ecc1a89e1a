# SPDX-License-Identifier: MIT
"""Sums over tokens, in parts or at once, and which of them can be used."""

from __future__ import annotations

import math

import pytest
import torch

from afpq.algorithms import LayerStatistics

CPU = torch.device("cpu")


def test_parts_add_up() -> None:
    torch.manual_seed(0)
    x, f = torch.randn(2, 30, 4)
    statistics = LayerStatistics.empty(4, True, CPU)
    for rows in (slice(0, 11), slice(11, 30)):
        statistics.add(x[rows], f[rows])
    assert statistics.tokens == 30 and statistics.D is not None
    torch.testing.assert_close(statistics.H, x.T @ x)
    torch.testing.assert_close(statistics.D, x.T @ (f - x))


def test_without_the_float_model_there_is_no_D() -> None:
    statistics = LayerStatistics.empty(4, False, CPU)
    statistics.add(torch.ones(3, 4), None)
    assert statistics.D is None and statistics.importance is not None
    assert statistics.importance.tolist() == [3.0] * 4


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf])
def test_zero_and_non_finite_sums_are_not_used(fill: float) -> None:
    bad = torch.full((4, 4), fill)
    statistics = LayerStatistics(bad, None, 3, bad)
    assert statistics.importance is None and statistics.usable_G is None


def test_G_is_used_if_it_is_there() -> None:
    assert LayerStatistics(torch.eye(4), None, 3).usable_G is None
    assert torch.equal(LayerStatistics(torch.eye(4), None, 3, torch.eye(2)).usable_G, torch.eye(2))  # type: ignore[arg-type]
