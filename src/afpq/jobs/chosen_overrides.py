# SPDX-License-Identifier: MIT
"""The schemes chosen for a bit budget as overrides of the recipe: one short pattern for each scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from afpq.calibration.sensitivity import kind_of_layer
from afpq.checkpoint.plan import Plan
from afpq.jobs.bit_budget import Choice
from afpq.model.blocks import find_blocks, in_blocks
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


def with_choice(recipe: Recipe, choice: Choice, plan: Plan, model: PreTrainedModel) -> Recipe:
    """Return the recipe with the most frequent scheme as its own, and overrides for others after the user's."""
    weights: Counter[Scheme] = Counter()
    kinds: dict[Scheme, dict[str, None]] = {}
    layers = choice.layers()
    for target in plan.block_targets:
        if target.module in layers:
            scheme = layers[target.module]
            weights[scheme] += target.elements
            kinds.setdefault(scheme, {})[kind_of_layer(target)] = None
    base = weights.most_common(1)[0][0]
    blocks = [block.name for block in find_blocks(model)]
    start = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = tuple((pattern_of(list(kinds[s]), blocks, start), s) for s in choice.budget.candidates if s in kinds)
    return replace(recipe, scheme=base, overrides=recipe.overrides + tuple(p for p in found if p[1] != base))


def pattern_of(names: Sequence[str], blocks: Sequence[str], start: str = "") -> str:
    """Return a regular expression for exactly these layers: for each set of linears, the numbers of its blocks.

    A `*` is any number, such as an expert's. `start`, such as "model.", is optional: names lack it if the model is
    loaded without its head.
    """
    found: dict[tuple[str, str], list[str]] = {}  # (list of blocks, linear inside) -> numbers
    for name in names:
        block = next(block for block in blocks if in_blocks(name, {block}))
        place, _, number = block.rpartition(".")
        found.setdefault((place, name.removeprefix(block).removeprefix(".")), []).append(number)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (place, linear), numbers in found.items():
        merged.setdefault((place, tuple(numbers)), []).append(linear)
    parts = []
    for (place, numbers_of), linears in merged.items():
        optional = f"(?:{re.escape(start)})?" if start and place.startswith(start) else ""
        head = optional + re.escape(place.removeprefix(start) if optional else place)
        inside = [re.escape(linear).replace(r"\*", r"\d+") for linear in linears]
        leaf = "" if linears == [""] else rf"\.{_any(inside)}"  # "": the block is itself a linear
        parts.append(rf"{head}\.{_any(numbers_of)}{leaf}")
    return f"^{_any(parts)}$"


def _any(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"
