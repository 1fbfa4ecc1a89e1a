# SPDX-License-Identifier: MIT
"""Measure one cell of a comparison: the float model, a model quantized by afpq, or another tool's approximation."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from afpq.checkpoint.info import model_info
from afpq.comparison.cells import FLOAT, Cell, LayerError, Result
from afpq.comparison.distributions import SAMPLED_LAYERS, SAMPLED_ROWS, code_counts, some_rows, spread
from afpq.comparison.peers import Peer, approximate
from afpq.comparison.speed import compare_speed
from afpq.comparison.tasks import Agenda, Question
from afpq.evaluation.loading import load_model
from afpq.evaluation.perplexity import TokenScores, logits_of, measure
from afpq.jobs.execute import execute
from afpq.jobs.finish_directory import LOG_NAME
from afpq.jobs.prepare import Job
from afpq.model.blocks import find_linears
from afpq.model.linear import AfpqLinear
from afpq.model.skeleton import build_skeleton
from afpq.model.unfuse import unfuse
from afpq.numerics.groups import relative_squared_error
from afpq.numerics.size import Size
from afpq.progress import Progress

KEPT_LOGITS = 2**30  # bytes of the float model's logits that are held in memory; more are computed anew for each cell


class Meter:
    """The measurements of a comparison; the float model and its logits are loaded once, when they are needed."""

    def __init__(self, question: Question, agenda: Agenda) -> None:
        self.question, self.agenda = question, agenda

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

    def _scores(self, model: Any, step: Progress) -> TokenScores:
        """Measure a quantized model against the float model: the last part of a cell's work."""

        def last_part(_: str, done: int, total: int) -> None:
            step("measuring", 6 * total + 4 * done, 10 * total)

        return measure(model, self.agenda.windows, self._reference(), last_part)

    def make_again(self, job: Job, place: Path, step: Progress) -> None:
        """Quantize the model into `place`, without measuring it."""
        job = replace(job, model=build_skeleton(job.plan.checkpoint.directory, self.question.trust_remote_code))
        execute(job, place, progress=lambda name, done, total: step(f"quantizing {name}", done, total))

    def measure_float(self, step: Progress) -> Result:
        """Measure the float model, whose speed is 1."""
        info = model_info(self.question.model, self.question.trust_remote_code)
        scores = measure(self._original, self.agenda.windows, None, lambda _, i, n: step("measuring", i, n))
        speed, rate = compare_speed(self._original, None, self.agenda.windows[0])
        return _result(FLOAT, scores, info.bits_per_weight, 0.0, info.file_bytes, speed=speed, tokens_per_second=rate)

    def measure_job(self, cell: Cell, job: Job, place: Path, step: Progress) -> Result:
        """Quantize the model into `place`, unless it is there, and measure it."""
        trust = self.question.trust_remote_code
        fresh = not place.exists() and not place.with_name(f"{place.name}.partial").exists()
        # Calibration fills the architecture with weights, so each job gets its own.
        job = replace(job, model=build_skeleton(job.plan.checkpoint.directory, trust))
        start = time.perf_counter()
        if not place.exists():
            execute(job, place, progress=lambda name, done, total: step(f"quantizing {name}", 6 * done, 10 * total))
        seconds = time.perf_counter() - start if fresh else None
        info, model = model_info(place, trust), load_model(place, trust)
        scores = self._scores(model, step)
        speed, rate = compare_speed(model, self._original, self.agenda.windows[0])
        return _result(
            cell, scores, info.bits_per_weight, info.coverage, info.file_bytes,
            seconds=seconds, speed=speed, tokens_per_second=rate, layers=_layer_errors(place), codes=_used_codes(model),
            calibration=self._calibration(job),
        )  # fmt: skip

    def _calibration(self, job: Job) -> str | None:
        if job.windows is None:
            return None
        return f"{self.question.calibration_name}, {job.windows.shape[0]} windows of {job.windows.shape[1]} tokens"

    def measure_peer(self, cell: Cell, peer: Peer, step: Progress) -> Result:
        """Measure another tool: its approximation of every weight in the plan, in a copy of the float model."""
        plan = self.agenda.first.plan
        infos, targets = plan.checkpoint.tensors, plan.targets
        model = load_model(self.question.model, self.question.trust_remote_code)
        unfuse(model)
        linears, errors, stored = dict(find_linears(model)), [], Size(0, 0)
        start = time.perf_counter()
        for index, target in enumerate(targets):
            step("quantizing", 6 * index, 10 * len(targets))
            weight = linears[target.module].weight
            back, packed = approximate(peer, target.module, weight)
            stored += Size(packed, target.elements)
            errors.append(LayerError(target.module, relative_squared_error(weight.detach().float(), back.float())))
            weight.data = back
        seconds = time.perf_counter() - start
        scores = self._scores(model, step)
        files = sum(file.stat().st_size for file in {info.file for info in infos.values()})
        replaced = {t.source.tensor: infos[t.source.tensor] for t in targets}.values()
        size = files - sum(info.stored_bytes for info in replaced) + stored.bytes
        return _result(cell, scores, stored.bits, plan.coverage, size, seconds=seconds, layers=tuple(errors))


def _result(cell: Cell, scores: TokenScores, bits: float, coverage: float, file_bytes: int, **others: Any) -> Result:
    divergences = () if scores.divergences is None else tuple(scores.divergences.mean(1).tolist())
    losses = tuple(scores.losses.mean(1).tolist())
    return Result(cell, bits, coverage, file_bytes, scores.evaluation(), losses, divergences, **others)


def _layer_errors(directory: Path) -> tuple[LayerError, ...]:
    """Read the layers' errors from a quantized model's log."""
    logs = [json.loads(line) for line in (directory / LOG_NAME).read_text("utf-8").splitlines() if line]
    return tuple(
        LayerError(log["module"], log["weight_error"], log.get("output_error_before"), log.get("output_error"))
        for log in logs
    )


def _used_codes(model: Any) -> tuple[int, ...]:
    """Count how often each code is used, in a sample of layers and rows."""
    layers = spread([m for m in model.modules() if isinstance(m, AfpqLinear)], SAMPLED_LAYERS)
    counts = sum(
        code_counts(some_rows(layer.quantized_weight().codes, SAMPLED_ROWS), len(layer.scheme.format.values))
        for layer in layers
    )
    assert isinstance(counts, Tensor)
    return tuple(counts.tolist())
