# SPDX-License-Identifier: MIT
"""The choice is the best there is, whatever the numbers; more budget never makes it worse."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.errors import AfpqError
from afpq.jobs.knapsack import choose_options

LOSS = st.one_of(st.floats(0, 1), st.floats(0, 1e-9), st.sampled_from([0.0, 1.0]))
GROUP = st.lists(st.tuples(st.integers(0, 40), LOSS), min_size=1, max_size=4)
PROBLEM = st.lists(GROUP, min_size=1, max_size=5)


def solve(groups: list[list[tuple[int, float]]], budget: int) -> tuple[int, float]:
    """(cost, loss) of the choice."""
    chosen = choose_options([[c for c, _ in g] for g in groups], [[x for _, x in g] for g in groups], budget)
    picked = [group[option] for group, option in zip(groups, chosen, strict=True)]
    return sum(c for c, _ in picked), sum(x for _, x in picked)


@given(groups=PROBLEM, extra=st.integers(0, 150))
def test_as_good_as_trying_all(groups: list[list[tuple[int, float]]], extra: int) -> None:
    budget = sum(min(c for c, _ in group) for group in groups) + extra
    fitting = [pick for pick in itertools.product(*groups) if sum(c for c, _ in pick) <= budget]
    best = min(sum(x for _, x in pick) for pick in fitting)
    cost, loss = solve(groups, budget)
    assert cost <= budget
    assert loss == pytest.approx(best, rel=1e-8, abs=1e-18)


@given(groups=PROBLEM, extra=st.integers(0, 100), more=st.integers(0, 50))
def test_more_budget_is_never_worse(groups: list[list[tuple[int, float]]], extra: int, more: int) -> None:
    budget = sum(min(c for c, _ in group) for group in groups) + extra
    assert solve(groups, budget + more)[1] <= solve(groups, budget)[1] * (1 + 1e-8)


def test_a_model_of_many_layers_is_filled_to_the_brim() -> None:
    """400 groups of 12 schemes: losses fall by about a fourth part with each bit, each layer in its own way."""
    dice = random.Random(0)
    bits = [2.25 + 0.25 * step for step in range(12)]
    groups = []
    for _ in range(400):
        size, weight = dice.choice([2**18, 3 * 2**18, 2**20]), 10 ** dice.uniform(-6, -3)
        groups.append([(int(size * b / 8) + 8, weight * 4**-b * dice.uniform(0.8, 1.25)) for b in bits])
    cheapest, dearest = sum(g[0][0] for g in groups), sum(g[-1][0] for g in groups)
    for share in (0.1, 0.5, 0.9):
        budget = int(cheapest + share * (dearest - cheapest))
        cost, _ = solve(groups, budget)
        assert budget - 2**15 < cost <= budget


def test_a_budget_below_the_cheapest_is_an_error() -> None:
    with pytest.raises(AfpqError, match="cheapest options cost 5"):
        choose_options([[2, 4], [3]], [[1.0, 0.0], [0.0]], 4)
