# SPDX-License-Identifier: MIT
"""METHODS: every `--method` as a row of data. A new solver is one file in this folder and one row here.

All other code reads the rows and depends on no method's name. Help texts are made of them too, so this file imports no
torch: a row's solver is imported when it is first used (`solvers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from afpq.algorithms.solver_options import AwqOptions, GptqOptions, SolverOptions
from afpq.errors import AfpqError
from afpq.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from afpq.algorithms.layer_problem import LayerProblem, Solution
    from afpq.numerics.groups import QuantizedWeight

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


Solve = Callable[["LayerProblem"], "Solution"]
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


def solve_without_data(
    name: str, method: str, W: Tensor, scheme: Scheme, options: SolverOptions, search: str
) -> QuantizedWeight:
    """One weight [out, in], any float, by a method that needs no text. Raises AfpqError that starts with `name`."""
    from afpq.algorithms.layer_problem import LayerProblem

    try:
        return METHODS[method].solve(LayerProblem(W, None, scheme, options, search)).weight
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None


# ---- rows


def _solver(name: str) -> Solve:
    """A function of `solvers.py`, imported on first use."""

    def solve(problem: LayerProblem) -> Solution:
        found: Solve = getattr(import_module("afpq.algorithms.solvers"), name)
        return found(problem)

    return solve


def _gptq_traits(options: GptqOptions) -> Traits:
    return Traits(inputs=True, float_inputs=options.float_target, sequential=options.sequential, damp=options.damp)


def _gptq_cost(shape: tuple[int, int], _: Scheme, options: GptqOptions, parts: int = 1) -> Cost:
    """The factor of H, then a pass over the columns for rounding, correcting and each sweep, for each part of rows."""
    rows, width = shape
    passes = 2 + options.sweeps
    return Cost(4 * width**3 + 2 * rows * width**2 * passes, parts * passes * width, 8 * 4 * width**2, codebooks=2)


def _guided_cost(shape: tuple[int, int], scheme: Scheme, options: GptqOptions) -> Cost:
    from afpq.algorithms.guided_gptq import PARTS

    return _gptq_cost(shape, scheme, options, PARTS)


def _clip_cost(shape: tuple[int, int], scheme: Scheme, _: AwqOptions) -> Cost:
    from afpq.numerics.scale_search import RATIOS

    rows, width = shape
    return Cost(2 * rows * width * scheme.span(width) * 2 * len(RATIOS), bytes=2 * 4 * width**2)


METHODS: dict[str, Method] = {
    NEAREST: Method(
        summary="Round every weight to the nearest value; needs no text.",
        solve=_solver("solve_nearest"),
        while_loading=True,
    ),
    "gptq": Method(
        summary="Round column by column and correct the columns to come, so that outputs stay.",
        solve=_solver("solve_gptq"),
        options=GptqOptions,
        traits=_gptq_traits,
        cost=_gptq_cost,
    ),
    "awq": Method(
        summary="Scale channels by their inputs' sizes, then round to the nearest value.",
        solve=_solver("solve_clipped"),
        options=AwqOptions,
        traits=lambda options: Traits(inputs=True, sequential=options.sequential),
        cost=_clip_cost,
        scales_channels=True,
    ),
    "awq+gptq": Method(
        summary="AWQ's channel scales, then GPTQ.",
        solve=_solver("solve_gptq"),
        options=GptqOptions,
        traits=_gptq_traits,
        cost=_gptq_cost,
        scales_channels=True,
    ),
    "tune": Method(
        summary="GPTQ with errors weighed by the gradients of the model's predictions, too.",
        solve=_solver("solve_guided"),
        options=GptqOptions,
        traits=lambda options: replace(_gptq_traits(options), gradients=True),
        cost=_guided_cost,
    ),
}
