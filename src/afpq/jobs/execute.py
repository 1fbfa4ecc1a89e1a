# SPDX-License-Identifier: MIT
"""Carry out a job: the weights unit by unit, then all that makes the directory a model, tested before it is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from afpq.calibration.calibrated_run import CalibrationRun, run_calibrated
from afpq.calibration.round_units import UnitResult, run
from afpq.checkpoint.atomic_files import write_json, write_whole
from afpq.checkpoint.checksums import write_checksums
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.quantization_config import config_to_json
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.unaware_loaders import guarded
from afpq.checkpoint.verify import check_tensors, digest
from afpq.checkpoint.work_directory import WorkDirectory, work_directory
from afpq.checkpoint.writer import ShardWriter
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.evaluation.memory import available_device_memory, available_memory
from afpq.jobs.bit_budget import SENSITIVITIES
from afpq.jobs.card_sample import CardFigures, measure_card_text
from afpq.jobs.end_pass import EndPass, end_pass_bytes, run_end_pass, vector_places
from afpq.jobs.finite_values import check_kept
from afpq.jobs.prepare import Job, Progress
from afpq.jobs.quality_card import Card, write_card
from afpq.jobs.selftest import check_reloaded
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import METHODS
from afpq.version import __version__

LOG_NAME = "afpq_log.jsonl"
END_PASS = "the end pass"  # in the journal, behind the units


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the card's figures or why there are none, what the self-test did, and the layers that were
    rounded to nearest for want of anything to learn from, such as experts that no token was routed to.
    """

    measured: CardFigures | str
    tested: str
    rounded: tuple[str, ...] = ()
    end_pass: EndPass | None = None


def execute(job: Job, out: Path, *, resume: bool = True, progress: Progress | None = None) -> Outcome:
    """Carry out a job into the new directory `out`, going on from OUT.partial if the same job was stopped there.

    The result gets its name once it has passed the self-test and has its card. Raises AfpqError where it does not pass.
    """
    check_kept(job.plan, job.model)
    with work_directory(out, job.plan.output_bytes, job.fingerprint(), resume) as work:
        if job.plan.recipe.end_pass and END_PASS not in work.finished:
            _check_memory(job)
        _write_weights(job, work, progress)
        _tune_end(job, work, progress)
        return _complete(job, work, progress)


def _write_weights(job: Job, work: WorkDirectory, progress: Progress | None) -> None:
    plan, infos = job.plan, job.plan.checkpoint.tensors
    sizes = {unit.name: sum(infos[name].elements for name in unit.tensors) for unit in plan.units}
    written = [name for unit in plan.units if unit.name in work.finished for name in plan.unit_outputs(unit)]
    with ShardWriter(work.path, plan.outputs(), written=written) as writer:
        for result in _results(job, work.scratch, frozenset(work.finished), progress):
            digests = {}
            for name, tensor in result.tensors:
                writer.write(name, tensor)
                digests[name] = digest(tensor)
            writer.sync()
            work.finish(result.unit.name, [log.to_json() for log in result.logs], digests)
            if progress is not None:
                done = sum(sizes[name] for name in work.finished)
                progress(_describe(result), done, sum(sizes.values()))


def _results(job: Job, scratch: Path, finished: frozenset[str], progress: Progress | None) -> Iterator[UnitResult]:
    if job.windows is None or not METHODS[job.plan.recipe.method].calibrated:
        return run(job.plan, finished)
    settings = job.settings
    device, report = settings.torch_device(), progress or (lambda *_: None)
    calibration = CalibrationRun(job.windows, scratch, device, settings.all_experts, settings.seed, report)
    return run_calibrated(job.plan, job.model, calibration, finished)


def _describe(result: UnitResult) -> str:
    """The unit, and the mean relative error of its layers."""
    errors = [log.weight_error if log.output_error is None else log.output_error for log in result.logs]
    return f"{result.unit.name} error {sum(errors) / len(errors):.2e}" if errors else result.unit.name


def _check_memory(job: Job) -> None:
    """Raises AfpqError, before anything is computed, where the end pass has no room for both models."""
    device = job.settings.torch_device()
    cuda = device.type == "cuda"
    needed, free = end_pass_bytes(job.plan), available_device_memory(device) if cuda else available_memory()
    if needed > free:
        raise AfpqError(
            f"the end pass holds the original and the result in memory, about {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free. Do without --end-pass"
        )


def _tune_end(job: Job, work: WorkDirectory, progress: Progress | None) -> None:
    """The end pass. What it changes is written whole beside the weights first, so a killed run cannot mix the two."""
    if not job.plan.recipe.end_pass or END_PASS in work.finished:
        return
    file, outputs = work.scratch / "end_pass.safetensors", job.plan.outputs()
    if not file.exists():
        tensors, told = _tuned(job, work, progress)
        write_whole(file, save(tensors, {"told": json.dumps(told.to_json())}))
    with safe_open(file, "pt") as content, ShardWriter(work.path, outputs, written=outputs) as writer:
        told_of = json.loads(content.metadata()["told"])
        digests = {}
        for name in content.keys():  # noqa: SIM118  (not a dictionary)
            tensor = content.get_tensor(name)
            writer.write(name, tensor)
            digests[name] = digest(tensor)
    work.finish(END_PASS, [told_of], digests)


def _tuned(job: Job, work: WorkDirectory, progress: Progress | None) -> tuple[dict[str, Tensor], EndPass]:
    """The tensors that the end pass changes, by their names in the files."""
    plan, settings, trust = job.plan, job.settings, job.trust_remote_code
    assert job.windows is not None
    weights = sum(info.elements for info in plan.checkpoint.tensors.values())

    def advance(done: int, count: int) -> None:
        if progress is not None:
            progress(f"end pass {done} of {count}", weights, weights)

    places = vector_places(plan)
    outputs = plan.outputs()
    config = _config(job, settled(plan, _notes(plan, work)), None)
    with work.as_published(config) as directory, quiet_transformers():
        original = load_model(plan.checkpoint.directory, trust, str(settings.torch_device()))
        model = load_model(directory, trust, str(settings.torch_device()))
    vectors = {name: outputs[tensor][0] for name, tensor in places.items()}
    scales, found, told = run_end_pass(
        model, original, job.windows, plan.recipe.end_pass, settings.seed, vectors, advance
    )
    prefixes = {target.module: target.prefix for target in plan.targets}
    tensors = {prefixes[m] + part: t for m, parts in scales.items() if m in prefixes for part, t in parts.items()}
    tensors |= {places[name]: vector for name, vector in found.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, told


def _complete(job: Job, work: WorkDirectory, progress: Progress | None) -> Outcome:
    """Everything beside the weights; config.json comes last: with it the directory is a model."""
    trust = job.trust_remote_code
    notes, ended = _notes(job.plan, work), _end_pass(work)
    plan = settled(job.plan, notes)
    if job.choice is not None:
        write_json(work.path / SENSITIVITIES, job.choice.to_json())
    (work.path / LOG_NAME).write_text("\n".join(map(json.dumps, notes)) + "\n", "utf-8")
    for path in plan.checkpoint.companions():
        shutil.copyfile(path, work.path / path.name)
    config = _config(job, plan, ended)
    with work.as_published(config) as directory:
        written = open_checkpoint(directory)
        check_tensors(written, plan.outputs(), work.digests)
        write_checksums(work.path, plan.outputs(), work.digests, config)
        work.keep = True  # the weights are right: whatever is wrong now, they need not be computed again
        tested = check_reloaded(written, plan, job.model, trust)
        measured = _measured(job, directory, progress)
    model = job.name or str(plan.checkpoint.directory)
    write_card(work.path, Card(model, job.plan, notes, _calibration(job, ended), measured, tested, job.choice))
    write_json(work.path / "config.json", config)
    rounded = tuple(note["module"] for note in notes if note["method"] == "rtn" != plan.recipe.method)
    return Outcome(measured, tested, rounded, ended)


def _notes(plan: Plan, work: WorkDirectory) -> list[dict[str, Any]]:
    """What was noted of each layer, in the plan's order."""
    return [note for unit in plan.units for note in work.finished[unit.name]]


def _end_pass(work: WorkDirectory) -> EndPass | None:
    return EndPass(**work.finished[END_PASS][0]) if END_PASS in work.finished else None


def settled(plan: Plan, notes: Sequence[dict[str, Any]]) -> Plan:
    """The plan as carried out: where books were learned, each target has the one that the log notes of it."""
    noted = {note["module"]: note["scheme"] for note in notes}
    learned = [target.module for target in plan.targets if target.scheme.format.learned]
    return plan.with_schemes({module: parse_scheme(noted[module]) for module in learned}) if learned else plan


def _measured(job: Job, directory: Path, progress: Progress | None) -> CardFigures | str:
    """The card's figures, or why there are none."""
    if isinstance(job.sample, str):
        return job.sample
    weights = sum(info.elements for info in job.plan.checkpoint.tensors.values())

    def advance(done: int, count: int) -> None:
        if progress is not None:
            progress(f"measuring {done} of {count}", weights, weights)

    device = job.settings.torch_device()
    return measure_card_text(job.plan, directory, job.sample, device, job.trust_remote_code, advance)


def _config(job: Job, plan: Plan, ended: EndPass | None) -> dict[str, Any]:
    """config.json of the result, whose plan has been carried out."""
    keys = config_to_json(plan.recipe, plan.kept)
    if job.windows is not None:
        keys["calibration"] = {
            "samples": job.windows.shape[0],
            "seq_len": job.windows.shape[1],
            "seed": job.settings.seed,
            "sha256": hashlib.sha256(job.windows.numpy().tobytes()).hexdigest(),
        }
    if job.choice is not None:
        budget = job.choice.budget
        keys["budget"] = {"bits_per_weight": budget.bits_per_weight, "candidates": list(map(str, budget.candidates))}
    if ended is not None:
        keys["end_pass"] = ended.to_json()
    keys["made_by"] = f"afpq {__version__}"
    return guarded({**job.plan.checkpoint.config, "quantization_config": keys})


def _calibration(job: Job, ended: EndPass | None) -> str | None:
    """How the method was calibrated, and what the end pass did, for the card."""
    if job.windows is None:
        return None
    count, length = job.windows.shape
    text = f"Calibration: {count} windows of {length} tokens of {job.text_name}, seed {job.settings.seed}."
    if ended is None:
        return text
    return (
        f"{text} Then {ended.steps} steps of tuning all scales, norms and biases together: KL {ended.kl_before:.4f} to "
        f"{ended.kl_after:.4f} on {ended.judging_windows} of these windows, which only judged."
    )
