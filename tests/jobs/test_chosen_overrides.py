# SPDX-License-Identifier: MIT
"""Chosen schemes as overrides: a pattern matches its layers and no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from budget_jobs import FEW
from budget_jobs import chosen as chosen  # the fixture
from hypothesis import given
from hypothesis import strategies as st

from afpq import Recipe, parse_scheme
from afpq.calibration.sensitivity import GroupLosses
from afpq.jobs.chosen_overrides import pattern_of, with_choice
from afpq.jobs.prepare import Job
from afpq.model.blocks import find_blocks

NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True)


@given(parts=st.dictionaries(st.sampled_from(["a.q", "a.k", "m.up", "experts.*.w1"]), NUMBERS, min_size=1))
def test_a_pattern_matches_its_layers_and_no_others(parts: dict[str, list[int]]) -> None:
    blocks = [f"model.layers.{number}" for number in range(13)]
    names = [f"model.layers.{number}.{inside}" for inside, numbers in parts.items() for number in numbers]
    pattern = pattern_of(names, blocks, "model.")
    for block in blocks:
        for inside in ("a.q", "a.k", "m.up", "experts.*.w1", "m.upper", "b.a.q", "a.q.b"):
            name = f"{block}.{inside}"
            real = name.replace("*", "17")
            for seen in (real, real.removeprefix("model.")):
                assert (re.search(pattern, seen) is not None) == (name in names), (pattern, seen)


def test_a_pattern_of_blocks_that_are_linears_matches_them() -> None:
    names, blocks = ["model.side.0", "model.layers.1.q"], [f"model.{p}.{i}" for p in ("side", "layers") for i in (0, 1)]
    pattern = pattern_of(names, blocks, "model.")
    seen = [*names, "model.side.1", "model.layers.0.q", "model.side.0.q", "side.0", "model.side.00"]
    assert [name for name in seen if re.search(pattern, name)] == [*names, "side.0"]


def test_the_scheme_of_most_weights_is_the_recipes_own(chosen: tuple[Job, Path]) -> None:
    job, _ = chosen
    groups = [GroupLosses((target.module,), (0.0,)) for target in job.plan.block_targets]
    assert job.choice is not None
    one = replace(job.choice, groups=tuple(groups), schemes=(parse_scheme(FEW[1]),) * len(groups))
    recipe = with_choice(Recipe(parse_scheme("int4-asym-g64")), one, job.plan, job.model)
    assert str(recipe.scheme) == FEW[1] and recipe.overrides == ()
    assert len(find_blocks(job.model)) == 2
