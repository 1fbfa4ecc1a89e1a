# SPDX-License-Identifier: MIT
"""Options of solvers: what a field's metadata becomes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from afpq.algorithms.solver_options import (
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


@pytest.mark.parametrize("wrong", [{"order": "random"}, {"damp": 0}, {"damp": 1.5}, {"sweeps": -1}])
def test_wrong_values_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(AfpqError, match=f"{next(iter(wrong))} "):
        GptqOptions(**wrong)  # type: ignore[arg-type]
