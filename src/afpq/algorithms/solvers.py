# SPDX-License-Identifier: MIT
"""The solvers of METHODS, as functions of one layer's problem: problem -> solution."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from afpq.algorithms.awq import search_clips
from afpq.algorithms.float_target import toward_float_outputs
from afpq.algorithms.gptq import quantize_gptq
from afpq.algorithms.guided_gptq import quantize_guided
from afpq.algorithms.layer_problem import LayerProblem, Solution
from afpq.numerics.groups import QuantizedWeight, encode


def solve_nearest(problem: LayerProblem) -> Solution:
    """Round to nearest."""
    return Solution(problem.nearest, problem.W)


def solve_clipped(problem: LayerProblem) -> Solution:
    """AWQ's second half: the "mse" search clips scales by the errors of the outputs."""
    if problem.search != "mse":
        return solve_nearest(problem)
    fitted = problem.nearest.fitted
    scales = search_clips(problem.W, problem.measured.H, fitted)
    return Solution(QuantizedWeight(encode(problem.W, scales, fitted.scheme), scales, fitted.scheme), problem.W)


def solve_gptq(problem: LayerProblem) -> Solution:
    """GPTQ, towards the float model's outputs if the options ask for it."""
    target, options = _target(problem), problem.options
    weight, damp = quantize_gptq(target, problem.measured.H, problem.scheme, options, problem.search)
    return Solution(weight, target, damp)


def solve_guided(problem: LayerProblem) -> Solution:
    """Guided GPTQ; GPTQ, with a note, if no gradients reach the layer."""
    G = problem.measured.usable_G
    if G is None:
        return replace(solve_gptq(problem), method="gptq", note="no gradients reach it; by GPTQ")
    target, options = _target(problem), problem.options
    weight, damp = quantize_guided(target, problem.measured.H, G, problem.scheme, options, problem.search)
    return Solution(weight, target, damp)


def _target(problem: LayerProblem) -> Tensor:
    """The weight that GPTQ aims at."""
    statistics, options = problem.measured, problem.options
    if statistics.D is None or not options.float_target:
        return problem.W
    return toward_float_outputs(problem.W, statistics.H, statistics.D, options.damp)
