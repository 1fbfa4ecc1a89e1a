# SPDX-License-Identifier: MIT
"""Estimate a run before it starts: memory from the plan's shapes, time from a few probes of this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from afpq.algorithms import fit_scheme, quantize_rtn
from afpq.algorithms.methods import METHODS, Cost
from afpq.calibration.head_inputs import PART
from afpq.calibration.hidden_states import BLOCK_BATCH_TOKENS
from afpq.checkpoint.plan import OUTSIDE, Plan
from afpq.jobs.end_pass import EVALUATIONS, HELD_OUT_ONE_IN, STEP_TOKENS, end_pass_bytes

BASE_BYTES = 600_000_000  # the process itself: torch, transformers, tokenizer
SECONDS_A_CALL = 1e-4  # of a step of GPTQ, whatever the number of rows
AWQ_GRID, FOLDS = 21, 4  # candidates tried for each fold, folds of a usual block


@dataclass(frozen=True)
class Estimate:
    """Peak memory of the process (files of hidden states come on top, on the disk) and seconds, both rough."""

    memory_bytes: int
    scratch_bytes: int
    seconds: float


def estimate(plan: Plan, windows: tuple[int, int] | None) -> Estimate:
    """`windows` is (count, length) of the calibration, None for methods that need none."""
    found = _solving(plan, windows)
    if windows is None or not plan.recipe.end_pass:
        return found
    memory = max(found.memory_bytes, BASE_BYTES + end_pass_bytes(plan))
    return replace(found, memory_bytes=memory, seconds=found.seconds + _end_pass_flops(plan, windows) / _flops())


def _solving(plan: Plan, windows: tuple[int, int] | None) -> Estimate:
    recipe, infos = plan.recipe, plan.checkpoint.tensors
    largest = max(info.bytes for info in infos.values())
    scheme = replace(recipe.scheme, format=recipe.scheme.format.start)
    costs = _costs(plan)
    solve = sum(t.elements for t in plan.targets) / _rate(lambda: quantize_rtn(_WEIGHT, scheme, recipe.search))
    solve += _codebook_seconds(plan, costs) + SECONDS_A_CALL * sum(cost.calls for cost in costs)
    if windows is None or not METHODS[recipe.method].calibrated:
        flops = sum(cost.flops for cost in costs)
        return Estimate(BASE_BYTES + 2 * largest, 0, 3 * solve + (flops / _flops() if flops else 0))
    tokens = windows[0] * windows[1]
    memory = _calibration_bytes(plan, costs, largest)
    flops = _calibration_flops(plan, tokens, recipe.traits.float_model) + sum(cost.flops for cost in costs)
    if recipe.traits.gradients:
        flops += _gradient_flops(plan, tokens)
    if METHODS[recipe.method].scales_channels:
        elements = sum(t.elements for t in plan.targets)
        flops += AWQ_GRID * FOLDS * 2 * min(tokens, BLOCK_BATCH_TOKENS) * elements / 2  # half of a block, on average
        solve += AWQ_GRID * elements / _rate(lambda: quantize_rtn(_WEIGHT, scheme))
    return Estimate(memory, scratch_bytes(plan, windows), solve + flops / _flops())


def scratch_bytes(plan: Plan, windows: tuple[int, int] | None) -> int:
    """Return the bytes of the files of hidden states, float32, while a run of (count, length) windows is calibrated."""
    recipe = plan.recipe
    if windows is None or not METHODS[recipe.method].calibrated:
        return 0
    width = min(t.shape[1] for t in plan.block_targets or plan.targets)
    files = 4 if recipe.traits.float_model else 2
    if recipe.traits.gradients:
        files += sum(unit.in_blocks for unit in plan.units)  # what enters each block; then the gradients behind it
    return 4 * windows[0] * windows[1] * width * files


def _costs(plan: Plan) -> list[Cost]:
    """The cost of solving each target."""
    cost, options = METHODS[plan.recipe.method].cost, plan.recipe.solver_options
    return [cost(target.shape, target.scheme, options) for target in plan.targets]


def _calibration_bytes(plan: Plan, costs: Sequence[Cost], largest: int) -> int:
    """Peak memory: what stands outside the blocks, a block or two, statistics, a batch of states, the head in parts."""
    infos, traits = plan.checkpoint.tensors, plan.recipe.traits
    block = max(sum(infos[n].elements for n in unit.tensors) for unit in plan.units if unit.in_blocks)
    outside = sum(infos[n].elements for unit in plan.units if unit.name == OUTSIDE for n in unit.tensors)
    widest = max(max(t.shape[1] for t in plan.targets), 1)
    batch = 6 * 4 * BLOCK_BATCH_TOKENS * widest  # what a forward pass holds, in float32
    memory = BASE_BYTES + 4 * (outside + (2 if traits.float_model else 1) * block) + 2 * largest + batch
    memory += max(cost.bytes for cost in costs)
    memory += max((8 * t.elements + 24 * min(t.elements, PART) for t in plan.end_targets), default=0)
    if traits.gradients:
        memory += 4 * max(sum(t.shape[0] ** 2 for t in unit.targets) for unit in plan.units if unit.in_blocks)
        memory += 8 * max(t.shape[0] for t in plan.block_targets) ** 2
    return memory


def _end_pass_flops(plan: Plan, windows: tuple[int, int]) -> float:
    """A step is a pass of the original, and forwards, forwards once more and backwards (two passes) of the result."""
    elements = sum(info.elements for info in plan.checkpoint.tensors.values())
    step = 2 * 5 * max(STEP_TOKENS, windows[1]) * elements
    judging = 2 * 2 * (EVALUATIONS + 1) * windows[0] * windows[1] / HELD_OUT_ONE_IN * elements
    return plan.recipe.end_pass * step + judging


def _calibration_flops(plan: Plan, tokens: int, float_model: bool) -> float:
    """Forward passes (three to four a stream: parts of the block for each stage, then all of it), and statistics."""
    share = _expert_share(plan)
    reached = [(t, tokens * (share if t.expert else 1)) for t in plan.targets]
    forward = sum(2 * count * t.elements for t, count in reached) * 3.5 * (2 if float_model else 1)
    return forward + sum(2 * count * t.shape[1] ** 2 for t, count in reached) * (2 if float_model else 1)


def _gradient_flops(plan: Plan, tokens: int) -> float:
    """Three passes forwards and two backwards, each of twice the work; the gradients' moments and their factors."""
    share = _expert_share(plan)
    reached = [(t, tokens * (share if t.expert else 1)) for t in plan.block_targets]
    passes = sum(2 * count * t.elements for t, count in reached) * 7
    return (
        passes
        + sum(2 * count * t.shape[0] ** 2 for t, count in reached)
        + sum(4 * t.shape[0] ** 3 for t in plan.block_targets)
    )


def _expert_share(plan: Plan) -> float:
    """Share of the tokens that reach an expert, if all are chosen alike; 1 if the config does not state it."""
    config = plan.checkpoint.config.get("text_config") or plan.checkpoint.config
    chosen = config.get("num_experts_per_tok")
    layers = Counter(t.module.rpartition(".")[0].rpartition(".")[0] for t in plan.targets if t.expert)
    if not isinstance(chosen, int) or not layers:
        return 1.0
    experts = max(layers.values()) // len({t.module.rpartition(".")[2] for t in plan.targets if t.expert})
    return min(1.0, chosen / experts)


_WEIGHT = torch.linspace(-1, 1, 256 * 1024).view(256, 1024)


def _codebook_seconds(plan: Plan, costs: Sequence[Cost]) -> float:
    """Seconds of all searches for learned codebooks."""
    learned = [(t.scheme, cost.codebooks) for t, cost in zip(plan.targets, costs) if t.scheme.format.learned]
    if not learned:
        return 0.0
    rate = _rate(lambda: fit_scheme(_WEIGHT, learned[0][0], plan.recipe.search))
    return sum(searches for _, searches in learned) * _WEIGHT.numel() / rate


def _rate(work: Callable[[], object]) -> float:
    """Weights a second of `work` on _WEIGHT."""
    work()
    start = time.perf_counter()
    work()
    return _WEIGHT.numel() / (time.perf_counter() - start)


def _flops() -> float:
    """Float32 operations a second of a matrix product here."""
    a = torch.ones(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (time.perf_counter() - start)
