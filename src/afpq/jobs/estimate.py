# SPDX-License-Identifier: MIT
"""What a run will need, before it starts: memory from the plan's shapes, time from a few probes of this machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from afpq.algorithms import fit_scheme, quantize_rtn
from afpq.algorithms.guided_gptq import PARTS
from afpq.calibration.head_inputs import PART
from afpq.calibration.hidden_states import BLOCK_BATCH_TOKENS
from afpq.checkpoint.plan import OUTSIDE, Plan, Target
from afpq.jobs.end_pass import EVALUATIONS, HELD_OUT_ONE_IN, STEP_TOKENS, end_pass_bytes
from afpq.numerics.scale_search import RATIOS
from afpq.recipe import METHODS

BASE_BYTES = 600_000_000  # the process itself: torch, transformers, tokenizer
SECONDS_A_COLUMN = 1e-4  # what a step of GPTQ costs in calls, whatever the number of rows
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
    infos = plan.checkpoint.tensors
    largest = max(info.bytes for info in infos.values())
    scheme = replace(plan.recipe.scheme, format=plan.recipe.scheme.format.start)
    solve = sum(t.elements for t in plan.targets) / _rate(lambda: quantize_rtn(_WEIGHT, scheme, plan.recipe.search))
    solve += _learning(plan)
    method, gptq = METHODS[plan.recipe.method], plan.recipe.gptq
    if windows is None or not method.calibrated:
        return Estimate(BASE_BYTES + 2 * largest, 0, 3 * solve)
    beside = method.guided or (method.solver == "gptq" and gptq.float_target)
    block = max(sum(infos[n].elements for n in unit.tensors) for unit in plan.units if unit.in_blocks)
    outside = sum(infos[n].elements for unit in plan.units if unit.name == OUTSIDE for n in unit.tensors)
    widest = max(max(t.shape[1] for t in plan.targets), 1)
    width = min(t.shape[1] for t in plan.block_targets or plan.targets)
    moments = (8 if method.solver == "gptq" else 2) * 4 * widest**2
    batch = 6 * 4 * BLOCK_BATCH_TOKENS * widest  # what a forward pass holds, in float32
    memory = BASE_BYTES + 4 * (outside + (2 if beside else 1) * block) + 2 * largest + moments + batch
    memory += max((8 * t.elements + 24 * min(t.elements, PART) for t in plan.end_targets), default=0)
    states = 4 * windows[0] * windows[1] * width
    files = 4 if beside else 2
    flops = _calibration_flops(plan, windows[0] * windows[1], beside)
    if method.guided:
        memory += 4 * max(sum(t.shape[0] ** 2 for t in unit.targets) for unit in plan.units if unit.in_blocks)
        memory += 8 * max(t.shape[0] for t in plan.block_targets) ** 2
        files += sum(unit.in_blocks for unit in plan.units)  # what enters each block; then the gradients behind it
        flops += _gradient_flops(plan, windows[0] * windows[1])
    if method.transform == "awq":
        flops += _awq_flops(plan, windows[0] * windows[1])
        rounding = _rate(lambda: quantize_rtn(_WEIGHT, scheme))
        solve += AWQ_GRID * sum(t.elements for t in plan.targets) / rounding
    if method.solver == "gptq":
        parts = PARTS if method.guided else 1
        solve += SECONDS_A_COLUMN * parts * (2 + gptq.sweeps) * sum(_inputs(plan.targets))
    return Estimate(memory, states * files, solve + flops / _flops())


def _end_pass_flops(plan: Plan, windows: tuple[int, int]) -> float:
    """A step is a pass of the original, and forwards, forwards once more and backwards (two passes) of the result."""
    elements = sum(info.elements for info in plan.checkpoint.tensors.values())
    step = 2 * 5 * max(STEP_TOKENS, windows[1]) * elements
    judging = 2 * 2 * (EVALUATIONS + 1) * windows[0] * windows[1] / HELD_OUT_ONE_IN * elements
    return plan.recipe.end_pass * step + judging


def _calibration_flops(plan: Plan, tokens: int, beside: bool) -> float:
    """Forward passes (three to four a stream: parts of the block for each stage, then all of it), moments, solving."""
    solver = METHODS[plan.recipe.method].solver
    share = _expert_share(plan)
    reached = [(t, tokens * (share if t.expert else 1)) for t in plan.targets]
    forward = sum(2 * count * t.elements for t, count in reached) * 3.5 * (2 if beside else 1)
    moments = sum(2 * count * t.shape[1] ** 2 for t, count in reached) * (2 if beside else 1)
    solving = sum(4 * n**3 for n in _inputs(plan.targets)) if solver == "gptq" else 0
    columns = sum(2 * t.elements * t.shape[1] * (2 + plan.recipe.gptq.sweeps) for t in plan.targets)
    return forward + moments + solving + (columns if solver == "gptq" else 0)


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
    """Share of the tokens that reach an expert, if all are chosen alike; 1 where the config does not tell."""
    config = plan.checkpoint.config.get("text_config") or plan.checkpoint.config
    chosen = config.get("num_experts_per_tok")
    layers = Counter(t.module.rpartition(".")[0].rpartition(".")[0] for t in plan.targets if t.expert)
    if not isinstance(chosen, int) or not layers:
        return 1.0
    experts = max(layers.values()) // len({t.module.rpartition(".")[2] for t in plan.targets if t.expert})
    return min(1.0, chosen / experts)


def _awq_flops(plan: Plan, tokens: int) -> float:
    """A forward pass of a part of the block (half of it, on average) for each fold and candidate; the clips."""
    elements = sum(t.elements for t in plan.targets)
    search = AWQ_GRID * FOLDS * 2 * min(tokens, BLOCK_BATCH_TOKENS) * elements / 2
    clips = sum(2 * t.elements * t.scheme.span(t.shape[1]) * 2 * len(RATIOS) for t in plan.targets)
    return search + (clips if METHODS[plan.recipe.method].solver != "gptq" else 0)


def _inputs(targets: list[Target]) -> list[int]:
    return [t.shape[1] for t in targets]


_WEIGHT = torch.linspace(-1, 1, 256 * 1024).view(256, 1024)


def _learning(plan: Plan) -> float:
    """Seconds that learning code books takes: by GPTQ twice a layer, for rounding to nearest is compared with."""
    learned = [t.scheme for t in plan.targets if t.scheme.format.learned]
    if not learned:
        return 0.0
    count = len(learned) * (2 if METHODS[plan.recipe.method].solver == "gptq" else 1)
    return count * _WEIGHT.numel() / _rate(lambda: fit_scheme(_WEIGHT, learned[0], plan.recipe.search))


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
