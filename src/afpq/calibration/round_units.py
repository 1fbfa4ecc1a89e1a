# SPDX-License-Identifier: MIT
"""Run a plan: read a tensor, solve, pack, yield. Holds one tensor at a time, whatever the model's size."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from afpq.algorithms.rtn import quantize_named
from afpq.checkpoint.plan import KeptPart, Plan, PlanUnit, Target
from afpq.numerics.groups import relative_error
from afpq.numerics.packing import to_tensors
from afpq.recipe import Recipe


@dataclass(frozen=True)
class LayerLog:
    """What happened to one layer; a line of afpq_log.jsonl.

    Errors are relative: of the weights, sum (w - w_hat)^2 / sum w^2; with calibration also of the layer's outputs, by
    rounding to nearest ("before") and by the method used, weighed by gradients where that is guided. `note` tells why a
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
    """The output tensors of one unit, one at a time, and the logs of its layers (complete once all are taken)."""

    unit: PlanUnit
    tensors: Iterator[tuple[str, Tensor]]
    logs: list[LayerLog]


def run(plan: Plan, finished: Container[str] = ()) -> Iterator[UnitResult]:
    """Each unit of the plan in order, but for the finished ones, rounded to nearest. Take its tensors at once."""
    for unit in plan.units:
        if unit.name not in finished:
            logs: list[LayerLog] = []
            yield UnitResult(unit, unit_tensors(plan, unit, logs), logs)


def unit_tensors(
    plan: Plan, unit: PlanUnit, logs: list[LayerLog], note: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The unit's output tensors, its linears rounded to nearest; `note`: why, where the recipe has another method."""
    for name in unit.tensors:
        if name not in unit.replaced:
            yield name, plan.checkpoint.read(name)
        for part in unit.replaced.get(name, ()):
            if isinstance(part, KeptPart):
                yield part.output, plan.checkpoint.read_part(part.source)
                continue
            packed, log = _solve_target(plan.checkpoint.read_part(part.source), part, plan.recipe)
            logs.append(log if note is None else replace(log, method="rtn", note=note))
            yield from ((part.prefix + leaf, value) for leaf, value in packed.items())
            del packed


def _solve_target(weight: Tensor, target: Target, recipe: Recipe) -> tuple[dict[str, Tensor], LayerLog]:
    start = time.perf_counter()
    solved = quantize_named(target.tensor, weight, target.scheme, recipe.search)
    error = relative_error(weight, solved)
    bits = 8 * target.bytes / target.elements
    seconds = round(time.perf_counter() - start, 4)
    note = "rounded to nearest, as are all outside of the blocks" if recipe.method != "rtn" else None
    log = LayerLog(target.module, str(solved.scheme), "rtn", error, bits, seconds, note=note)
    return to_tensors(solved), log
