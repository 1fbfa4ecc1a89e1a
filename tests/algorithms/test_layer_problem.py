# SPDX-License-Identifier: MIT
"""A problem rounds its weight to nearest once, with columns weighed by their importance."""

from __future__ import annotations

import torch

from afpq import parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.algorithms.layer_problem import LayerProblem
from afpq.algorithms.layer_statistics import LayerStatistics
from afpq.algorithms.methods import METHODS
from afpq.algorithms.solver_options import SolverOptions

SCHEME = parse_scheme("nf3-asym-g32")


def test_rounding_to_nearest_is_shared_by_those_who_need_it() -> None:
    W = torch.randn(8, 32)
    problem = LayerProblem(W, None, SCHEME, SolverOptions(), "absmax")
    assert METHODS["rtn"].solve(problem).weight is problem.nearest
    assert torch.equal(problem.nearest.codes, quantize_rtn(W, SCHEME).codes)


def test_statistics_weigh_the_columns_of_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    W, sizes = torch.randn(8, 32), torch.linspace(0.01, 3, 32)
    statistics = LayerStatistics(torch.diag(sizes.square()), None, 100)
    weighed = LayerProblem(W, statistics, SCHEME, SolverOptions(), "mse").nearest.dequantize()
    plain = LayerProblem(W, None, SCHEME, SolverOptions(), "mse").nearest.dequantize()
    errors = [((rounded - W) * sizes).square().sum() for rounded in (weighed, plain)]
    assert errors[0] < errors[1]
