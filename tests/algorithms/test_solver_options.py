# SPDX-License-Identifier: MIT
"""Options take what makes sense and refuse the rest by name."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.algorithms.solver_options import ORDERS, GptqOptions
from afpq.errors import AfpqError


@given(
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.sampled_from(ORDERS),
    st.integers(0, 100),
    st.booleans(),
    st.booleans(),
)
def test_sensible_options_survive_saving(
    damp: float, order: str, sweeps: int, float_target: bool, sequential: bool
) -> None:
    options = GptqOptions(damp, order, sweeps, float_target, sequential)
    assert GptqOptions(**asdict(options)) == options


@given(st.one_of(st.floats(max_value=0), st.floats(min_value=1), st.just(math.nan)))
def test_damping_lies_between_nothing_and_the_whole_diagonal(damp: float) -> None:
    with pytest.raises(AfpqError, match="damp"):
        GptqOptions(damp=damp)


@given(st.integers(max_value=-1))
def test_sweeps_are_counted_from_zero(sweeps: int) -> None:
    with pytest.raises(AfpqError, match="sweeps"):
        GptqOptions(sweeps=sweeps)


@given(st.text().filter(lambda order: order not in ORDERS))
def test_an_unknown_order_is_refused_with_the_known_ones(order: str) -> None:
    with pytest.raises(AfpqError, match="group, act, none"):
        GptqOptions(order=order)
