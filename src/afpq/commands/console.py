# SPDX-License-Identifier: MIT
"""What the commands print of plans, choices and outcomes, as text and for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.plan import Plan
from afpq.commands.output import console, duration_text, results, warn
from afpq.errors import counted
from afpq.evaluation.tables import size_text, with_error
from afpq.jobs.advice import advice
from afpq.jobs.bit_budget import Choice
from afpq.jobs.chosen_shares import share_cells, shares
from afpq.jobs.estimate import Estimate
from afpq.jobs.finish_directory import Outcome
from afpq.jobs.left_ends import left_ends
from afpq.jobs.prepare import Job
from afpq.model.apply_folds import folds_of
from afpq.model.blocks import find_blocks
from afpq.model.coverage import coverage_warning, kinds_left


def print_plan(job: Job, verb: str, out: Path) -> None:
    """Print one paragraph on what was, or would be, done, and a warning if much of the model is left alone."""
    plan = job.plan
    schemes = plan.recipe.scheme if job.choice is None else "chosen below"
    results.print(
        f"{verb} {out}: {size_text(plan.output_bytes)} (was {size_text(plan.input_bytes)}), "
        f"{counted(len(plan.block_targets), 'linear')} as {schemes} by {plan.recipe.method}, "
        f"{plan.bits_per_weight:.3f} true bits per quantized weight, "
        f"{100 * plan.coverage:.1f} % of the blocks' weights quantized",
    )
    if plan.checkpoint.published is not None:
        console.print(f"the original is published as {plan.checkpoint.published.form}; read as floats")
    if job.choice is not None:
        print_choice(job.choice, plan)
    for target in plan.end_targets:
        console.print(
            f"{plan.end_words(target)} as {target.scheme}: {size_text(target.bytes)}, "
            f"{8 * target.bytes / target.elements:.3f} true bits per weight"
        )
    console.print(f"{plan.file_bits_per_weight:.3f} bits per weight of the whole file")
    if job.windows is not None:
        console.print(f"calibration: {counted(job.windows.shape[0], 'window')} of {job.windows.shape[1]} tokens")
    print_left(job)
    channels = METHODS[plan.recipe.method].scales_channels
    if channels and not any(folds_of(b.module) for b in find_blocks(job.model)):
        warn("no AWQ fold points are known for this architecture: its channels were not scaled, only clipped")
    print_coverage(plan.coverage, plan.left, plan.reasons)


def print_left(job: Job) -> None:
    """Print the linears that are left, and what share of the weights the embedding and the head are."""
    plan = job.plan
    ends = left_ends(plan, job.model)
    named = {module for end in ends for module in end.modules}
    kept = [name for name in plan.kept if name not in named]
    if kept:
        names = ", ".join(kept[:8]) + (f" and {len(kept) - 8} more" if len(kept) > 8 else "")
        console.print(f"left as {'it was' if len(kept) == 1 else 'they were'}: {names}")
    for end in ends:
        console.print(f"left as {'it was' if len(end.modules) == 1 else 'they were'}: {end.sentence()}")


def print_advice(job: Job, outcome: Outcome | None) -> None:
    """Print what the figures of a run, or the plan of a dry run, call for."""
    calibrates = not getattr(job.model.config, "is_encoder_decoder", False)
    line = advice(job.plan, None if outcome is None else outcome.measured, calibrates)
    if line is not None:
        console.print(f"advice: {line}")


def print_choice(choice: Choice, plan: Plan) -> None:
    """Print which scheme was chosen for what, under a budget of bits."""
    bits = choice.budget.bits_per_weight
    console.print(f"chosen for at most {bits:g} bits per weight; predicted KL, roughly: {choice.kl:.4f}")
    rows = share_cells(choice, plan)
    wide = max(len(row[0]) for row in rows)
    for scheme, true_bits, layers, weights, which in rows:
        noun = "layer" if layers == "1" else "layers"
        console.print(f"  {scheme:<{wide}}  {true_bits} bits  {weights:>7}  {layers:>4} {noun}: {which}")


def choice_json(choice: Choice | None, plan: Plan) -> dict[str, Any]:
    """Return a choice for `--json`; nothing if there was none. The plan contains the scheme of each layer."""
    if choice is None:
        return {}
    found = [{"scheme": str(s.scheme), "bits_per_weight": s.bits, "layers": s.layers} for s in shares(choice, plan)]
    return {"budget": {"bits_per_weight": choice.budget.bits_per_weight, "predicted_kl": choice.kl, "schemes": found}}


def print_coverage(coverage: float, left: Mapping[str, int], reasons: Mapping[str, str] | None = None) -> None:
    """Print a warning that names what was not quantized, if that is much or could not be."""
    warning = coverage_warning(coverage, left, reasons)
    if warning is not None:
        warn(warning)


def print_outcome(outcome: Outcome) -> None:
    """Print the figures of the card, and the result of the self-test."""
    if outcome.rounded:
        names = ", ".join(outcome.rounded[:4]) + (" and others" if len(outcome.rounded) > 4 else "")
        were = "was" if len(outcome.rounded) == 1 else "were"
        layers = counted(len(outcome.rounded), "layer")
        console.print(f"{layers} had nothing to learn from and {were} rounded to nearest: {names}")
    ended = outcome.end_pass
    if ended is not None:
        judges = counted(ended.judging_windows, "window")
        console.print(
            f"end pass: KL {ended.kl_before:.4f} -> {ended.kl_after:.4f} on {judges} that only judged, "
            f"kept from step {ended.kept_step} of {ended.steps}"
        )
    found = outcome.measured
    if isinstance(found, str):
        console.print(f"not measured: {found}")
    else:
        result, (count, length) = found.result, found.sample.windows.shape
        console.print(
            f"perplexity {result.perplexity:.2f} (original {found.original:.2f}), "
            f"KL {with_error(result.kl_divergence, result.kl_standard_error, 4)}, on {found.sample.origin}, "
            f"{counted(count, 'window')} of {length}"
        )
    console.print(f"self-test: every tensor was read back as it was computed. {outcome.tested}")


def outcome_json(outcome: Outcome | None) -> dict[str, Any]:
    """Return an outcome for `--json`; nothing for a dry run."""
    if outcome is None:
        return {}
    found = outcome.measured
    return {
        "rounded_to_nearest": list(outcome.rounded),
        "measured": {"reason": found} if isinstance(found, str) else found.to_json(),
        "self_test": outcome.tested,
        **({} if outcome.end_pass is None else {"end_pass": outcome.end_pass.to_json()}),
    }


def print_estimate(estimate: Estimate) -> None:
    """Print the figures of a dry run."""
    scratch = f", {size_text(estimate.scratch_bytes)} of scratch files" if estimate.scratch_bytes else ""
    console.print(f"about {size_text(estimate.memory_bytes)} of memory{scratch}, {duration_text(estimate.seconds)}")


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan for `--json`."""
    return {
        "scheme": str(plan.recipe.scheme),
        "method": plan.recipe.method,
        "bits_per_weight": plan.bits_per_weight,
        "coverage": plan.coverage,
        "left": kinds_left(plan.left),
        "file_bits_per_weight": plan.file_bits_per_weight,
        "output_bytes": plan.output_bytes,
        "input_bytes": plan.input_bytes,
        **({} if plan.checkpoint.published is None else {"published": plan.checkpoint.published.form}),
        "layers": [{"name": t.module, "scheme": str(t.scheme), "shape": list(t.shape)} for t in plan.targets],
        "kept": list(plan.kept),
        "unused": list(plan.unused),
        "reasons": dict(plan.reasons),
    }
