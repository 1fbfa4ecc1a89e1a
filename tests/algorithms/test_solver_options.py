# SPDX-License-Identifier: MIT
"""Options take what makes sense and refuse the rest by name; what a field's metadata becomes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.algorithms.solver_options import (
    ORDERS,
    AwqOptions,
    GptqOptions,
    SolverOptions,
    flag_of,
    option,
    options_to_json,
)
from afpq.errors import AfpqError


@dataclass(frozen=True)
class MadeUp(SolverOptions):
    max_rounds: int = option(4, "Rounds.")
    careful: bool = option(False, "Slow.", flag="--careful/--fast", json="is_careful")
    hidden: float = option(0.5, "Not saved.", saved=False)


def test_flags_and_keys_come_from_the_fields() -> None:
    assert [flag_of(part) for part in fields(MadeUp)] == ["--max-rounds", "--careful/--fast", "--hidden"]
    assert options_to_json(MadeUp(careful=True)) == {"max_rounds": 4, "is_careful": True}


def test_gptq_keeps_its_positions_and_its_keys() -> None:
    options = GptqOptions(0.02, "act", 1, False, False)
    assert list(options_to_json(options).items()) == [
        ("damp_percent", 0.02), ("order", "act"), ("sweeps", 1), ("float_target", False), ("true_sequential", False),
    ]  # fmt: skip
    assert options_to_json(AwqOptions()) == {} == options_to_json(SolverOptions())


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
