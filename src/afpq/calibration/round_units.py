# SPDX-License-Identifier: MIT
"""Run a plan whose method needs no text: read a tensor, quantize, pack, yield. Holds one tensor at a time."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from afpq.algorithms.methods import METHODS, NEAREST, solve_without_data
from afpq.checkpoint.plan import KeptPart, Plan, PlanUnit, Target
from afpq.numerics.groups import relative_error
from afpq.numerics.packing import to_tensors
from afpq.recipe import Recipe


@dataclass(frozen=True)
class LayerLog:
    """Record of one layer; a line of afpq_log.jsonl.

    Errors are relative: of the weights, sum (w - w_hat)^2 / sum w^2; with calibration also of the layer's outputs, by
    rounding to nearest ("before") and by the method used, weighed by gradients if that is guided. `note` states why a
    layer was treated otherwise, `transform` what was done to its block before.
    """

    module: str
    scheme: str
    method: str
    weight_error: float
    bits_per_weight: float
    seconds: float
    output_error_before: float | None = None
    output_error: float | None = None
    damp: float | None = None
    tokens: int | None = None
    note: str | None = None
    transform: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class UnitResult:
    """The output tensors of one unit, one at a time; `logs` of its layers and `schemes` of learned codebooks, by module
    as text, are complete once all tensors are taken.
    """

    unit: PlanUnit
    tensors: Iterator[tuple[str, Tensor]]
    logs: list[LayerLog]
    schemes: dict[str, str]


def run(plan: Plan, finished: Container[str] = ()) -> Iterator[UnitResult]:
    """Yield each unit of the plan in order, except the finished ones, by a method that needs no text.

    Take the tensors of one before the next.
    """
    for unit in plan.units:
        if unit.name not in finished:
            yield solve_unit(plan, unit, plan.recipe.method)


def round_unit(plan: Plan, unit: PlanUnit, note: str) -> UnitResult:
    """Round the unit's linears to nearest; `note`: why, if the recipe has another method."""
    return solve_unit(plan, unit, NEAREST, note)


def solve_unit(plan: Plan, unit: PlanUnit, method: str, note: str | None = None) -> UnitResult:
    """The unit with its linears by `method`, which needs no text, and `note` in their logs."""
    logs: list[LayerLog] = []
    schemes: dict[str, str] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in unit.tensors:
            if name not in unit.replaced:
                yield name, plan.checkpoint.read(name)
            for part in unit.replaced.get(name, ()):
                if isinstance(part, KeptPart):
                    yield part.output, plan.checkpoint.read_part(part.source)
                    continue
                packed, log = _solve_target(plan.checkpoint.read_part(part.source), part, plan.recipe, method)
                logs.append(replace(log, note=note))
                schemes.update(learned_schemes([part], [log]))
                yield from ((part.prefix + leaf, value) for leaf, value in packed.items())
                del packed

    return UnitResult(unit, tensors(), logs, schemes)


def learned_schemes(targets: Iterable[Target], logs: Iterable[LayerLog]) -> dict[str, str]:
    """The schemes of learned codebooks by module, as text, of targets and their logs in the same order."""
    return {t.module: log.scheme for t, log in zip(targets, logs, strict=True) if t.scheme.format.learned}


def _solve_target(weight: Tensor, target: Target, recipe: Recipe, method: str) -> tuple[dict[str, Tensor], LayerLog]:
    start = time.perf_counter()
    options = recipe.solver_options if method == recipe.method else METHODS[method].options()
    solved = solve_without_data(target.tensor, method, weight, target.scheme, options, recipe.search)
    error = relative_error(weight, solved)
    bits = 8 * target.bytes / target.elements
    seconds = round(time.perf_counter() - start, 4)
    return to_tensors(solved), LayerLog(target.module, str(solved.scheme), method, error, bits, seconds)
