# SPDX-License-Identifier: MIT
"""Estimates of a run: what they grow with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from afpq import GptqOptions, Recipe, parse_scheme
from afpq.checkpoint.plan import Plan
from afpq.jobs.estimate import BASE_BYTES, _costs, estimate
from afpq.jobs.prepare import prepare

NF3 = parse_scheme("nf3-asym-g64")


def plan_of(model: Path, recipe: Recipe) -> Plan:
    """The plan of `recipe`, although there is no text: as for a method without data."""
    plan = prepare(model, Recipe(recipe.scheme)).plan
    return replace(plan, recipe=recipe)


def test_without_data_there_are_no_files(tiny_model_dir: Path) -> None:
    found = estimate(plan_of(tiny_model_dir, Recipe(NF3)), None)
    assert found.scratch_bytes == 0 and found.memory_bytes > BASE_BYTES and found.seconds > 0


@pytest.mark.parametrize(("method", "files"), [("awq", 2), ("gptq", 4), ("tune", 4 + 2)])
def test_scratch_files_are_those_of_the_streams(tiny_model_dir: Path, method: str, files: int) -> None:
    plan = plan_of(tiny_model_dir, Recipe(NF3, method))
    width = min(target.shape[1] for target in plan.block_targets)
    assert estimate(plan, (3, 16)).scratch_bytes == 4 * 3 * 16 * width * files


def test_without_the_float_model_there_is_half(tiny_model_dir: Path) -> None:
    both = estimate(plan_of(tiny_model_dir, Recipe(NF3, "gptq")), (3, 16))
    one = estimate(plan_of(tiny_model_dir, Recipe(NF3, "gptq", options=GptqOptions(float_target=False))), (3, 16))
    assert one.scratch_bytes == both.scratch_bytes // 2 and one.memory_bytes < both.memory_bytes


def test_sweeps_are_counted(tiny_model_dir: Path) -> None:
    few, many = (
        sum(cost.calls for cost in _costs(plan_of(tiny_model_dir, Recipe(NF3, "gptq", options=GptqOptions(sweeps=n)))))
        for n in (0, 2)
    )
    assert many == 2 * few
    assert all(cost.calls == 0 for cost in _costs(plan_of(tiny_model_dir, Recipe(NF3, "awq"))))
