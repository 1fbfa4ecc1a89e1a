# SPDX-License-Identifier: MIT
"""The solvers are what the rows of METHODS call, and are imported when one of them is first called."""

from __future__ import annotations

import pytest
import torch

from afpq.algorithms import LayerStatistics, quantize_rtn, solvers
from afpq.algorithms.layer_problem import LayerProblem
from afpq.algorithms.methods import METHODS
from afpq.numerics.scheme import parse_scheme

SCHEME = parse_scheme("nf3-asym-g16")


def problem(method: str, search: str = "mse") -> LayerProblem:
    dice = torch.Generator().manual_seed(1)
    weight, x = torch.randn(8, 32, generator=dice), torch.randn(64, 32, generator=dice)
    statistics = LayerStatistics(x.T @ x, None, len(x))
    return LayerProblem(weight, statistics, SCHEME, METHODS[method].options(), search)


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("rtn", solvers.solve_nearest),
        ("gptq", solvers.solve_gptq),
        ("awq", solvers.solve_clipped),
        ("awq+gptq", solvers.solve_gptq),
        ("tune", solvers.solve_guided),
    ],
)
def test_a_row_calls_its_solver(method: str, solver: object) -> None:
    given = problem(method)
    by_row, directly = METHODS[method].solve(given).weight, solver(given).weight  # type: ignore[operator]
    assert torch.equal(by_row.codes, directly.codes) and torch.equal(by_row.scales.pos, directly.scales.pos)


def test_clipping_needs_the_search_for_it() -> None:
    given = problem("awq", "absmax")
    assert torch.equal(solvers.solve_clipped(given).weight.codes, quantize_rtn(given.W, SCHEME).codes)


def test_guided_without_gradients_is_gptq_and_a_note_says_so() -> None:
    found = solvers.solve_guided(problem("tune"))
    assert found.method == "gptq" and "no gradients" in str(found.note)
    assert torch.equal(found.weight.codes, solvers.solve_gptq(problem("gptq")).weight.codes)
