# SPDX-License-Identifier: MIT
"""Compare schemes and methods on one model: each is quantized, loaded, and measured against the float model.

What is finished is kept in DIRECTORY/cells and not measured again, as long as the model's files, the text and the
settings are the same; quantized models are made in DIRECTORY/work and deleted once they are measured, or made in
DIRECTORY/models and kept.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq.checkpoint.atomic_files import digest_value
from afpq.checkpoint.info import model_info
from afpq.checkpoint.lock import locked
from afpq.comparison.cells import CALIBRATION, FLOAT, Cell, LayerError, Result, changes, load, save
from afpq.comparison.distributions import (
    SAMPLED_LAYERS,
    SAMPLED_ROWS,
    Asymmetry,
    asymmetry,
    code_counts,
    some_rows,
    spread,
)
from afpq.comparison.peers import Peer, approximate, missing_packages
from afpq.comparison.rows import About
from afpq.comparison.speed import compare_speed
from afpq.comparison.tasks import Agenda, Question, Task
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model
from afpq.evaluation.perplexity import TokenScores, logits_of, measure
from afpq.jobs.execute import LOG_NAME, execute
from afpq.jobs.prepare import Job
from afpq.model.blocks import find_linears
from afpq.model.linear import AfpqLinear
from afpq.model.skeleton import build_skeleton
from afpq.model.unfuse import unfuse

SMALL = 500_000_000  # bytes of a model below which reading its weights is not what takes the time
KEPT_LOGITS = 2**30  # bytes of the float model's logits that are held in memory; more are computed anew for each cell

Progress = Callable[[str, float], None]  # (what is done now, share of all cells done)
Note = Callable[[str], None]


class Comparison:
    """An agenda being carried out in a directory; `left_out` tells in words what could not be.

    Raises AfpqError where the directory cannot be written.
    """

    def __init__(self, question: Question, agenda: Agenda, directory: Path) -> None:
        self.question, self.agenda = question, agenda
        self.left_out = list(agenda.left_out)
        self.directory = directory
        self.cells = directory / "cells"
        self.models = directory / ("models" if question.keep else "work")
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AfpqError(f"{directory}: cannot write the report: {error.strerror or error}") from None

    def run(self, progress: Progress, note: Note) -> list[Result]:
        """The float model's result, those of all cells asked for, then earlier ones of the same model and text.

        Raises AfpqError while another run works in the directory.
        """
        with locked(self.directory):
            return self._run(progress, note)

    def _run(self, progress: Progress, note: Note) -> list[Result]:
        results: list[Result] = []
        tasks = self.agenda.tasks
        for index, task in enumerate(tasks):
            result = self._finished(task, note)
            if result is None:

                def step(what: str, share: float, index: int = index, task: Task = task) -> None:
                    progress(f"{index + 1}/{len(tasks)} {task.cell}: {what}", (index + share) / len(tasks))

                result = self._measure(task, step, note)
                if result is None:
                    continue
                save(self.cells, result, task.fingerprint)
                note(f"[{index + 1}/{len(tasks)}] {describe(result)}")
            results.append(result)
        if not self.question.keep:
            shutil.rmtree(self.models, ignore_errors=True)
        return results + self._earlier(results, note)

    def _place(self, task: Task) -> Path:
        """Where a quantized model is made; another setting has another place, so none goes on from the wrong one."""
        return self.models / f"{task.cell.file_name}-{digest_value(task.fingerprint)[:8]}"

    def _finished(self, task: Task, note: Note) -> Result | None:
        """The result of an earlier run, where it is of the same model, text and setting."""
        found = load(self.cells / f"{task.cell.file_name}.json")
        if found is None:
            return None
        result, fingerprint = found
        if changed := changes(fingerprint, task.fingerprint):
            note(f"{task.cell}: was measured with another {' and another '.join(changed)}; measured again")
            return None
        if self.question.keep and task.job is not None and not self._place(task).exists():
            return None  # its model is wanted, and was deleted
        note(f"{task.cell}: kept from an earlier run")
        return result

    def _earlier(self, results: list[Result], note: Note) -> list[Result]:
        """Cells of earlier runs that were not asked for, of the same model, text and calibration."""
        wanted = {**self.agenda.tasks[0].fingerprint}
        for task in self.agenda.tasks:
            wanted |= {key: value for key, value in task.fingerprint.items() if key == CALIBRATION}
        known, extra = {task.cell for task in self.agenda.tasks}, []
        for path in sorted(self.cells.glob("*.json")):
            found = load(path)
            if found is None or found[0].cell in known:
                continue
            result, fingerprint = found
            changed = [key for key in wanted if key in fingerprint and fingerprint[key] != wanted[key]]
            if changed:
                note(f"{result.cell}: of an earlier run with another {' and another '.join(changed)}; left out")
            else:
                extra.append(result)
        return extra

    def _measure(self, task: Task, step: Progress, note: Note) -> Result | None:
        if task.job is not None:
            return self._measure_ours(task, task.job, step)
        if task.peer is None:
            return self._measure_float(step)
        try:
            return self._measure_peer(task.cell, task.peer, step)
        except AfpqError as error:  # another tool's trouble is no reason to stop, but is told
            self.left_out.append(str(error))
            note(f"left out: {error}")
            return None

    @cached_property
    def _original(self) -> Any:
        """The float model; loaded only when a cell has to be measured."""
        return load_model(self.question.model, self.question.trust_remote_code)

    @cached_property
    def _kept_logits(self) -> list[Tensor] | None:
        vocabulary = self._original.config.get_text_config().vocab_size
        if 4 * vocabulary * self.agenda.windows.numel() > KEPT_LOGITS:
            return None
        return [logits.cpu() for logits in logits_of(self._original, self.agenda.windows)]

    def _reference(self) -> Iterable[Tensor]:
        kept = self._kept_logits
        return logits_of(self._original, self.agenda.windows) if kept is None else kept

    def _measure_float(self, step: Progress) -> Result:
        info = model_info(self.question.model, self.question.trust_remote_code)
        seen = measure(self._original, self.agenda.windows, None, lambda i, n: step("measuring", i / n))
        speed, rate = compare_speed(self._original, None, self.agenda.windows[0])
        return _result(FLOAT, seen, info.bits_per_weight, 0.0, info.file_bytes, speed=speed, tokens_per_second=rate)

    def _measure_ours(self, task: Task, job: Job, step: Progress) -> Result:
        place, trust = self._place(task), self.question.trust_remote_code
        fresh = not place.exists() and not place.with_name(f"{place.name}.partial").exists()
        # Calibration fills the architecture with weights, so each job gets its own.
        job = replace(job, model=build_skeleton(job.plan.checkpoint.directory, trust))
        start = time.perf_counter()
        if not place.exists():
            execute(job, place, progress=lambda name, done, total: step(f"quantizing {name}", 0.6 * done / total))
        seconds = time.perf_counter() - start if fresh else None
        info, model = model_info(place, trust), load_model(place, trust)
        seen = measure(model, self.agenda.windows, self._reference(), lambda i, n: step("measuring", 0.6 + 0.4 * i / n))
        speed, rate = compare_speed(model, self._original, self.agenda.windows[0])
        result = _result(
            task.cell, seen, info.bits_per_weight, info.coverage, info.file_bytes,
            seconds=seconds, speed=speed, tokens_per_second=rate, layers=_layer_errors(place), codes=_used_codes(model),
            calibration=self._learned_from(job),
        )  # fmt: skip
        if not self.question.keep:
            shutil.rmtree(place)
        return result

    def _learned_from(self, job: Job) -> str | None:
        if job.windows is None:
            return None
        return f"{self.question.calibration_name}, {job.windows.shape[0]} windows of {job.windows.shape[1]} tokens"

    def _measure_peer(self, cell: Cell, peer: Peer, step: Progress) -> Result:
        """Its approximation of every weight we would quantize, put into another copy of the float model."""
        infos, targets = self.agenda.first.plan.checkpoint.tensors, self.agenda.first.plan.targets
        model = load_model(self.question.model, self.question.trust_remote_code)
        unfuse(model)
        linears, errors, packed = dict(find_linears(model)), [], 0
        start = time.perf_counter()
        for index, target in enumerate(targets):
            step("quantizing", 0.6 * index / len(targets))
            weight = linears[target.module].weight
            back, size = approximate(peer, target.module, weight)
            packed += size
            errors.append(LayerError(target.module, _relative_error(weight, back)))
            weight.data = back
        seconds = time.perf_counter() - start
        seen = measure(model, self.agenda.windows, self._reference(), lambda i, n: step("measuring", 0.6 + 0.4 * i / n))
        elements = sum(target.elements for target in targets)
        files = sum(file.stat().st_size for file in {info.file for info in infos.values()})
        replaced = {t.source.tensor: infos[t.source.tensor] for t in targets}.values()
        size = files - sum(info.stored_bytes for info in replaced) + packed
        coverage = self.agenda.first.plan.coverage
        return _result(cell, seen, 8 * packed / elements, coverage, size, seconds=seconds, layers=tuple(errors))


def _result(cell: Cell, seen: TokenScores, bits: float, coverage: float, file_bytes: int, **others: Any) -> Result:
    divergences = () if seen.divergences is None else tuple(seen.divergences.mean(1).tolist())
    losses = tuple(seen.losses.mean(1).tolist())
    return Result(cell, bits, coverage, file_bytes, seen.evaluation(), losses, divergences, **others)


def describe(result: Result) -> str:
    """A finished cell in a line."""
    e = result.evaluation
    kl = "" if e.kl_divergence is None else f", KL x 1000 {1000 * e.kl_divergence:.2f}"
    return f"{result.cell}: {result.bits_per_weight:.3f} bits, perplexity {e.perplexity:.3f}{kl}"


def describe_setting(comparison: Comparison, results: Sequence[Result]) -> About:
    """What was measured on what, for the report."""
    agenda, question = comparison.agenda, comparison.question
    learned = "; ".join(dict.fromkeys(result.calibration for result in results if result.calibration)) or None
    notes = [f"Left out: {reason}." for reason in comparison.left_out]
    missing = missing_packages() if question.peers else []
    if missing:
        notes.append(f"Other tools that were not installed: {', '.join(missing)}.")
    if agenda.first.plan.input_bytes < SMALL:
        notes.append("A model as small as this spends its time on overhead: its speed says little about larger ones.")
    threads = f"{torch.get_num_threads()} threads, float32 for the float model"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads}"
    windows = agenda.windows.shape[0], agenda.windows.shape[1]
    return About(
        Path(question.model).name,
        question.text_name,
        windows,
        learned,
        machine,
        agenda.first.plan.coverage,
        tuple(notes),
    )


def _layer_errors(directory: Path) -> tuple[LayerError, ...]:
    """What a quantized model's log says of its layers."""
    logs = [json.loads(line) for line in (directory / LOG_NAME).read_text("utf-8").splitlines() if line]
    return tuple(
        LayerError(log["module"], log["weight_error"], log.get("output_error_before"), log.get("output_error"))
        for log in logs
    )


def _relative_error(weight: Tensor, back: Tensor) -> float:
    """sum (w - w_hat)^2 / sum w^2, as in pipeline.py; 0 for a weight of zeros."""
    total = weight.detach().float().square().sum().item()
    return (back.float() - weight.detach().float()).square().sum().item() / total if total else 0.0


def _used_codes(model: Any) -> tuple[int, ...]:
    """How often each code is used, in a sample of layers and rows."""
    layers = spread([m for m in model.modules() if isinstance(m, AfpqLinear)], SAMPLED_LAYERS)
    counts = sum(
        code_counts(some_rows(layer.quantized_weight().codes, SAMPLED_ROWS), len(layer.scheme.format.values))
        for layer in layers
    )
    assert isinstance(counts, Tensor)
    return tuple(counts.tolist())


def asymmetries(agenda: Agenda, results: Sequence[Result]) -> list[Asymmetry]:
    """How lopsided the float weights' groups are, for each group size in the results; counted on a sample."""
    checkpoint = agenda.first.plan.checkpoint
    schemes = [result.cell.ours for result in results]
    sizes = sorted({scheme.group_size for scheme in schemes if scheme is not None}, key=lambda size: (size == -1, size))
    places = [target.source for target in spread(agenda.first.plan.targets, SAMPLED_LAYERS)]
    weights = [some_rows(checkpoint.read_part(place), SAMPLED_ROWS).float() for place in places]
    return [asymmetry(weights, size) for size in sizes]
