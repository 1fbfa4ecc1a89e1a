# SPDX-License-Identifier: MIT
"""Quantize one weight by the recipe's method, with the statistics of its layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from afpq.algorithms import LayerStatistics, SingularHessian
from afpq.algorithms.layer_problem import LayerProblem, Solution
from afpq.algorithms.methods import METHODS, NEAREST
from afpq.calibration.round_units import LayerLog
from afpq.checkpoint.plan import Target
from afpq.errors import AfpqError, named_lack_of_memory
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight, relative_error
from afpq.recipe import Recipe


def solve_layer(
    W: Tensor,
    statistics: LayerStatistics | None,
    target: Target,
    recipe: Recipe,
    fitted: FittedScheme | None = None,
) -> tuple[QuantizedWeight, LayerLog]:
    """Quantize W float32 [out, in]; rounded to nearest, with a note in the log, if its statistics are unusable.

    `fitted` is the target's scheme if it is settled already, as for one of a weight's parts.
    Raises AfpqError naming the tensor for NaN or Inf in the weight.
    """
    start = time.perf_counter()
    problem = LayerProblem(W, statistics, fitted or target.scheme, recipe.solver_options, recipe.search)
    before = after = None
    with named(target.tensor):
        if statistics is None:
            found = _nearest(problem, "not used on the calibration text; rounded to nearest")
        else:
            try:
                found = _solve(problem, recipe.method)
                before, after = (_output_error(weight, found, statistics) for weight in (problem.nearest, found.weight))
            except SingularHessian as error:
                found = _nearest(problem, f"{error}; rounded to nearest")
    log = LayerLog(
        module=target.module,
        scheme=str(found.weight.scheme),
        method=found.method or recipe.method,
        weight_error=relative_error(W, found.weight),
        bits_per_weight=8 * target.bytes / target.elements,
        seconds=round(time.perf_counter() - start, 4),
        output_error_before=before,
        output_error=after,
        damp=found.damp,
        tokens=None if statistics is None else statistics.tokens,
        note=found.note,
    )
    return found.weight, log


def _nearest(problem: LayerProblem, note: str) -> Solution:
    return Solution(problem.nearest, problem.W, method=NEAREST, note=note)


def _solve(problem: LayerProblem, method: str) -> Solution:
    if not bool(torch.isfinite(problem.measured.H).all()):
        raise SingularHessian("the layer's inputs are NaN or Inf")
    return METHODS[method].solve(problem)


def _output_error(weight: QuantizedWeight, found: Solution, statistics: LayerStatistics) -> float:
    """The squared error of the outputs against the target's, relative to those; weighed by G if there is one."""
    total = _loss(found.target, statistics)
    return _loss(weight.dequantize() - found.target, statistics) / total if total else 0.0


def _loss(E: Tensor, statistics: LayerStatistics) -> float:
    G = statistics.usable_G
    return ((E @ statistics.H) * (E if G is None else G @ E)).sum().item()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Start the message of an AfpqError raised inside, or of a lack of memory, with the name of the block or tensor."""
    try:
        with named_lack_of_memory():
            yield
    except SingularHessian:
        raise
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None
