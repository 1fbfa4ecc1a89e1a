# SPDX-License-Identifier: MIT
"""METHODS: every `--method` as a row of data. A new solver is one file in this folder and one row here.

All other code reads the rows and depends on no method's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from afpq.algorithms.awq import search_clips
from afpq.algorithms.float_target import toward_float_outputs
from afpq.algorithms.gptq import quantize_gptq
from afpq.algorithms.guided_gptq import PARTS, quantize_guided
from afpq.algorithms.layer_problem import LayerProblem, Solution
from afpq.algorithms.solver_options import AwqOptions, GptqOptions, SolverOptions
from afpq.errors import AfpqError
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.scale_search import RATIOS
from afpq.numerics.scheme import Scheme

NEAREST = "rtn"  # the method of a layer without usable statistics, and of the embedding


@dataclass(frozen=True)
class Traits:
    """What a method with given options needs, and how it treats errors.

    Attributes:
        inputs: it reads H, so text has to be run through the model.
        float_inputs: it reads D, so the float model runs next to the quantized one.
        gradients: it reads G, the second moment of the gradients at the layer's outputs.
        sequential: statistics are measured behind the quantized layers before it in the block, too.
        damp: the damping with which errors are passed on to other columns; None if every weight is rounded by itself.
    """

    inputs: bool = False
    float_inputs: bool = False
    gradients: bool = False
    sequential: bool = True
    damp: float | None = None

    @property
    def float_model(self) -> bool:
        """Whether the float model runs next to the quantized one: gradients are the float model's."""
        return self.float_inputs or self.gradients


@dataclass(frozen=True)
class Cost:
    """The cost of solving one layer, statistics excluded: float operations, calls of small kernels (a step of one
    column each), bytes held at once for second moments and their factors, and searches for a learned codebook.
    """

    flops: float = 0.0
    calls: int = 0
    bytes: int = 0
    codebooks: int = 1


Solve = Callable[[LayerProblem], Solution]
CostOf = Callable[[tuple[int, int], Scheme, Any], Cost]  # (out, in), scheme, options


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to find codes.

    Attributes:
        summary: one line for the command line's help.
        solve: raises SingularHessian for statistics that cannot be used (the layer is then rounded to nearest), and
            AfpqError for NaN or Inf in the weight.
        options: the type of its options; has a default for every field.
        traits, cost: functions of the options.
        scales_channels: AWQ's channel scales come first.
        while_loading: `from_pretrained` applies it to a float checkpoint.
    """

    summary: str
    solve: Solve
    options: type[SolverOptions] = SolverOptions
    traits: Callable[[Any], Traits] = lambda _: Traits()
    cost: CostOf = lambda *_: Cost()
    scales_channels: bool = False
    while_loading: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it needs text, with its default options."""
        return self.scales_channels or self.traits(self.options()).inputs

    @property
    def guided(self) -> bool:
        """Whether it needs gradients, with its default options."""
        return self.traits(self.options()).gradients


# ---- solvers: problem -> solution


def solve_nearest(problem: LayerProblem) -> Solution:
    return Solution(problem.nearest, problem.W)


def solve_clipped(problem: LayerProblem) -> Solution:
    """AWQ's second half: the "mse" search clips scales by the errors of the outputs."""
    if problem.search != "mse":
        return solve_nearest(problem)
    fitted = problem.nearest.fitted
    scales = search_clips(problem.W, problem.measured.H, fitted)
    return Solution(QuantizedWeight(encode(problem.W, scales, fitted.scheme), scales, fitted.scheme), problem.W)


def solve_gptq(problem: LayerProblem) -> Solution:
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


def solve_without_data(
    name: str, method: str, W: Tensor, scheme: Scheme, options: SolverOptions, search: str
) -> QuantizedWeight:
    """One weight [out, in], any float, by a method that needs no text. Raises AfpqError that starts with `name`."""
    try:
        return METHODS[method].solve(LayerProblem(W, None, scheme, options, search)).weight
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None


# ---- rows


def _gptq_traits(options: GptqOptions) -> Traits:
    return Traits(inputs=True, float_inputs=options.float_target, sequential=options.sequential, damp=options.damp)


def _gptq_cost(shape: tuple[int, int], _: Scheme, options: GptqOptions, parts: int = 1) -> Cost:
    """The factor of H, then a pass over the columns for rounding, correcting and each sweep, for each part of rows."""
    rows, width = shape
    passes = 2 + options.sweeps
    return Cost(4 * width**3 + 2 * rows * width**2 * passes, parts * passes * width, 8 * 4 * width**2, codebooks=2)


def _clip_cost(shape: tuple[int, int], scheme: Scheme, _: AwqOptions) -> Cost:
    rows, width = shape
    return Cost(2 * rows * width * scheme.span(width) * 2 * len(RATIOS), bytes=2 * 4 * width**2)


METHODS: dict[str, Method] = {
    NEAREST: Method(
        summary="Round every weight to the nearest value; needs no text.", solve=solve_nearest, while_loading=True
    ),
    "gptq": Method(
        summary="Round column by column and correct the columns to come, so that outputs stay.",
        solve=solve_gptq,
        options=GptqOptions,
        traits=_gptq_traits,
        cost=_gptq_cost,
    ),
    "awq": Method(
        summary="Scale channels by their inputs' sizes, then round to the nearest value.",
        solve=solve_clipped,
        options=AwqOptions,
        traits=lambda options: Traits(inputs=True, sequential=options.sequential),
        cost=_clip_cost,
        scales_channels=True,
    ),
    "awq+gptq": Method(
        summary="AWQ's channel scales, then GPTQ.",
        solve=solve_gptq,
        options=GptqOptions,
        traits=_gptq_traits,
        cost=_gptq_cost,
        scales_channels=True,
    ),
    "tune": Method(
        summary="GPTQ with errors weighed by the gradients of the model's predictions, too.",
        solve=solve_guided,
        options=GptqOptions,
        traits=lambda options: replace(_gptq_traits(options), gradients=True),
        cost=partial(_gptq_cost, parts=PARTS),
    ),
}
