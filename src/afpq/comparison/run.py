# SPDX-License-Identifier: MIT
"""Compare schemes and methods on one model: each is quantized, loaded, and measured against the float model.

What is finished is kept in DIRECTORY/cells and not measured again for the same model's files, text and settings; cells
of others lie beside it. Quantized models are made in DIRECTORY/work and deleted once they are measured, or made in
DIRECTORY/models and kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from afpq.checkpoint.atomic_files import digest_value
from afpq.checkpoint.lock import locked
from afpq.comparison.cells import CALIBRATION, Kept, Result, changes, load_all, save
from afpq.comparison.distributions import SAMPLED_LAYERS, SAMPLED_ROWS, Asymmetry, asymmetry, some_rows, spread
from afpq.comparison.measure_cell import Meter
from afpq.comparison.peers import missing_packages
from afpq.comparison.rows import About
from afpq.comparison.tasks import Agenda, Question, Task
from afpq.errors import AfpqError
from afpq.progress import Progress

WHOLE = 1000  # parts of a cell, in which its progress is counted
SMALL_MODEL = 500_000_000  # bytes of a model below which reading its weights is not what takes the time

Note = Callable[[str], None]


class Comparison:
    """An agenda being executed in a directory; `left_out` describes the cells that could not be measured.

    Raises AfpqError if the directory cannot be written.
    """

    def __init__(self, question: Question, agenda: Agenda, directory: Path) -> None:
        self.question, self.agenda = question, agenda
        self.left_out = list(agenda.left_out)
        self._meter = Meter(question, agenda)
        self.directory = directory
        self.cells = directory / "cells"
        self.models = directory / ("models" if question.keep else "work")
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AfpqError(f"{directory}: cannot write the report: {error.strerror or error}") from None

    def run(self, progress: Progress, note: Note) -> list[Result]:
        """Return the float model's result, those of all cells asked for, then earlier ones of the same model and text.

        Raises AfpqError while another run works in the directory.
        """
        with locked(self.directory):
            return self._run(progress, note)

    def _run(self, progress: Progress, note: Note) -> list[Result]:
        results: list[Result] = []
        tasks, kept = self.agenda.tasks, load_all(self.cells)
        used: set[Path] = set()
        for index, task in enumerate(tasks):

            def step(what: str, done: int, total: int, index: int = index, task: Task = task) -> None:
                parts = index * WHOLE + WHOLE * done // max(total, 1)
                progress(f"{index + 1}/{len(tasks)} {task.cell}: {what}", parts, len(tasks) * WHOLE)

            found = self._finished(task, kept, step, note)
            if found is not None:
                used.add(found.path)
                results.append(found.result)
                continue
            result = self._measure(task, step, note)
            if result is None:
                continue
            result = replace(result, text=self.text)
            save(self.cells, result, task.fingerprint)
            note(f"[{index + 1}/{len(tasks)}] {describe(result)}")
            results.append(result)
        if not self.question.keep:
            shutil.rmtree(self.models, ignore_errors=True)
        return results + self._earlier([each for each in kept if each.path not in used], note)

    @property
    def text(self) -> str:
        """What is measured on, in words."""
        count, length = self.agenda.windows.shape
        return f"{self.question.text_name}, {count} windows of {length} tokens"

    def _place(self, task: Task) -> Path:
        """Return the directory for a quantized model: one for each setting, so that none resumes from another's."""
        return self.models / f"{task.cell.file_name}-{digest_value(task.fingerprint)[:8]}"

    def _finished(self, task: Task, kept: Sequence[Kept], step: Progress, note: Note) -> Kept | None:
        """Return the result of an earlier run of the same model, text and setting; make its model again if wanted."""
        same = [each for each in kept if each.result.cell == task.cell]
        found = next((each for each in same if not changes(each.fingerprint, task.fingerprint)), None)
        if found is None:
            if same:
                changed = " and another ".join(changes(same[0].fingerprint, task.fingerprint))
                note(f"{task.cell}: was measured with another {changed}, which is kept; measured anew")
            return None
        if self.question.keep and task.job is not None and not self._place(task).exists():
            self._meter.make_again(task.job, self._place(task), step)
        note(f"{task.cell}: kept from an earlier run")
        return found

    def _earlier(self, others: Sequence[Kept], note: Note) -> list[Result]:
        """Return cells of earlier runs that were not asked for, of the same model, text and calibration.

        All others are left out, and the report lists them with the reason.
        """
        wanted = {**self.agenda.tasks[0].fingerprint}
        for task in self.agenda.tasks:
            wanted |= {key: value for key, value in task.fingerprint.items() if key == CALIBRATION}
        shown, extra = {task.cell for task in self.agenda.tasks}, []
        reasons: dict[str, list[str]] = {}
        for each in others:
            cell, theirs = each.result.cell, each.fingerprint
            changed = [key for key in wanted if key in theirs and theirs[key] != wanted[key]]
            if not changed and cell not in shown:
                shown.add(cell)
                extra.append(each.result)
                continue
            reasons.setdefault(_reason(each.result, changed), []).append(str(cell))
        for reason, cells in reasons.items():
            self.left_out.append(f"{', '.join(sorted(cells))} of an earlier run, {reason}")
            note(f"left out: {self.left_out[-1]}")
        return sorted(extra, key=lambda result: str(result.cell))

    def _measure(self, task: Task, step: Progress, note: Note) -> Result | None:
        if task.job is not None:
            place = self._place(task)
            result = self._meter.measure_job(task.cell, task.job, place, step)
            if not self.question.keep:
                shutil.rmtree(place)
            return result
        if task.peer is None:
            return self._meter.measure_float(step)
        try:
            return self._meter.measure_peer(task.cell, task.peer, step)
        except AfpqError as error:  # another tool's trouble is no reason to stop, but is reported
            self.left_out.append(str(error))
            note(f"left out: {error}")
            return None


def _reason(result: Result, changed: Sequence[str]) -> str:
    """Why a finished cell is not among those shown."""
    if not changed:
        learned = f" ({result.calibration})" if result.calibration else ""
        return f"with other settings{learned} than the same cell shown"
    about = {"text": result.text, CALIBRATION: result.calibration}
    parts = (f"another {key}" + (f" ({about[key]})" if about.get(key) else "") for key in changed)
    return f"with {' and '.join(parts)}"


def describe(result: Result) -> str:
    """Describe a finished cell in a line."""
    e = result.evaluation
    kl = "" if e.kl_divergence is None else f", KL x 1000 {1000 * e.kl_divergence:.2f}"
    return f"{result.cell}: {result.bits_per_weight:.3f} bits, perplexity {e.perplexity:.3f}{kl}"


def describe_setting(comparison: Comparison, results: Sequence[Result]) -> About:
    """Describe for the report what was measured, and on what."""
    agenda, question = comparison.agenda, comparison.question
    calibration = "; ".join(dict.fromkeys(result.calibration for result in results if result.calibration)) or None
    notes = [f"Left out: {reason}." for reason in comparison.left_out]
    missing = missing_packages() if question.peers else []
    if missing:
        notes.append(f"Other tools that were not installed: {', '.join(missing)}.")
    if agenda.first.plan.input_bytes < SMALL_MODEL:
        notes.append("A model as small as this spends its time on overhead: its speed says little about larger ones.")
    threads = f"{torch.get_num_threads()} threads, float32 for the float model"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads}"
    windows = agenda.windows.shape[0], agenda.windows.shape[1]
    return About(
        Path(question.model).name,
        question.text_name,
        windows,
        calibration,
        machine,
        agenda.first.plan.coverage,
        tuple(notes),
    )


def asymmetries(agenda: Agenda, results: Sequence[Result]) -> list[Asymmetry]:
    """Measure how lopsided the float weights' groups are, for each group size in the results; counted on a sample."""
    checkpoint = agenda.first.plan.checkpoint
    schemes = [result.cell.ours for result in results]
    sizes = sorted({scheme.group_size for scheme in schemes if scheme is not None}, key=lambda size: (size == -1, size))
    places = [target.source for target in spread(agenda.first.plan.targets, SAMPLED_LAYERS)]
    weights = [some_rows(checkpoint.read_part(place), SAMPLED_ROWS).float() for place in places]
    return [asymmetry(weights, size) for size in sizes]
