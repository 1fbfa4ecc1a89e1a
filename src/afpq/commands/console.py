# SPDX-License-Identifier: MIT
"""Output of the command line: tables, progress and files of results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.atomic_files import write_json
from afpq.checkpoint.plan import Plan
from afpq.errors import AfpqError
from afpq.evaluation.loading import quiet_transformers as quiet_transformers
from afpq.evaluation.tables import size_text as size_text
from afpq.evaluation.tables import with_error
from afpq.jobs.bit_budget import Choice
from afpq.jobs.chosen_shares import share_cells, shares
from afpq.jobs.estimate import Estimate
from afpq.jobs.finish_directory import Outcome
from afpq.jobs.prepare import Job
from afpq.model.apply_folds import folds_of
from afpq.model.blocks import find_blocks
from afpq.model.coverage import coverage_warning, kinds_left
from afpq.progress import Progress

# Names and texts are printed as they are: no markup, no emoji codes, no breaks at the terminal's width.
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_plan(job: Job, verb: str, out: Path) -> None:
    """Print one paragraph on what was, or would be, done, and a warning if much of the model is left alone."""
    plan = job.plan
    schemes = plan.recipe.scheme if job.choice is None else "chosen below"
    console.print(
        f"{verb} {out}: {size_text(plan.output_bytes)} (was {size_text(plan.input_bytes)}), "
        f"{len(plan.block_targets)} linears as {schemes} by {plan.recipe.method}, "
        f"{plan.bits_per_weight:.3f} true bits per quantized weight, "
        f"{100 * plan.coverage:.1f} % of the blocks' weights quantized",
    )
    if job.choice is not None:
        print_choice(job.choice, plan)
    for target in plan.end_targets:
        console.print(
            f"{plan.end_words(target)} as {target.scheme}: {size_text(target.bytes)}, "
            f"{8 * target.bytes / target.elements:.3f} true bits per weight"
        )
    console.print(f"{plan.file_bits_per_weight:.3f} bits per weight of the whole file")
    if job.windows is not None:
        console.print(f"calibration: {job.windows.shape[0]} windows of {job.windows.shape[1]} tokens")
    if plan.kept:
        names = ", ".join(plan.kept[:8]) + (f" and {len(plan.kept) - 8} more" if len(plan.kept) > 8 else "")
        console.print(f"left as they were: {names}")
    channels = METHODS[plan.recipe.method].scales_channels
    if channels and not any(folds_of(b.module) for b in find_blocks(job.model)):
        errors.print(
            "warning: no AWQ fold points are known for this architecture: its channels were not scaled, only clipped",
            style="bold yellow",
        )
    print_coverage(plan.coverage, plan.left, plan.reasons)


def print_choice(choice: Choice, plan: Plan) -> None:
    """Print which scheme was chosen for what, under a budget of bits."""
    bits = choice.budget.bits_per_weight
    console.print(f"chosen for at most {bits:g} bits per weight; predicted KL, roughly: {choice.kl:.4f}")
    rows = share_cells(choice, plan)
    wide = max(len(row[0]) for row in rows)
    for scheme, true_bits, layers, weights, which in rows:
        console.print(f"  {scheme:<{wide}}  {true_bits} bits  {weights:>7}  {layers:>4} layers: {which}")


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
        errors.print(f"warning: {warning}", style="bold yellow")


def print_outcome(outcome: Outcome) -> None:
    """Print the figures of the card, and the result of the self-test."""
    if outcome.rounded:
        names = ", ".join(outcome.rounded[:4]) + (" and others" if len(outcome.rounded) > 4 else "")
        console.print(f"{len(outcome.rounded)} layers had nothing to learn from and were rounded to nearest: {names}")
    ended = outcome.end_pass
    if ended is not None:
        console.print(
            f"end pass: KL {ended.kl_before:.4f} -> {ended.kl_after:.4f} on {ended.judging_windows} windows that only "
            f"judged, kept from step {ended.kept_step} of {ended.steps}"
        )
    found = outcome.measured
    if isinstance(found, str):
        console.print(f"not measured: {found}")
    else:
        result, (count, length) = found.result, found.sample.windows.shape
        console.print(
            f"perplexity {result.perplexity:.2f} (original {found.original:.2f}), "
            f"KL {with_error(result.kl_divergence, result.kl_standard_error, 4)}, on {found.sample.origin}, "
            f"{count} windows of {length}"
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
        "layers": [{"name": t.module, "scheme": str(t.scheme), "shape": list(t.shape)} for t in plan.targets],
        "kept": list(plan.kept),
        "reasons": dict(plan.reasons),
    }


def check_json_place(path: Path | None) -> None:
    """Raises AfpqError, before any work, if `--json` could not be written after it."""
    if path is None:
        return
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AfpqError(f"{path}: cannot write the JSON there; give a file in an existing directory")


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def save_json(path: Path | None, value: Any) -> None:
    if path is not None:
        try:
            write_json(path, value)
        except OSError as error:
            raise AfpqError(f"{path}: cannot write: {error.strerror or error}") from None


@contextmanager
def progress_bar(first: str) -> Iterator[Progress]:
    """Show a bar with the time left, on standard error; nothing if that is no terminal."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(first, total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
