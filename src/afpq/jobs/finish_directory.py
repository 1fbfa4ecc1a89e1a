# SPDX-License-Identifier: MIT
"""Make a model of a directory of weights: end pass, self-test, card, config and log."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.atomic_files import write_json, write_whole
from afpq.checkpoint.checksums import write_checksums
from afpq.checkpoint.companions import copy_companions
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.quantization_config import config_to_json
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.unaware_loaders import guarded
from afpq.checkpoint.verify import check_tensors, digest
from afpq.checkpoint.work_directory import WorkDirectory
from afpq.checkpoint.writer import ShardWriter
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.evaluation.memory import available_device_memory, available_memory
from afpq.jobs.card_sample import CardFigures, measure_card_text
from afpq.jobs.end_pass import EndPass, end_pass_bytes, run_end_pass, vector_places
from afpq.jobs.prepare import Job
from afpq.jobs.quality_card import Card, write_card
from afpq.jobs.selftest import check_reloaded
from afpq.jobs.sensitivity_file import SENSITIVITIES
from afpq.numerics.scheme import parse_scheme
from afpq.progress import Progress
from afpq.version import __version__

LOG_NAME = "afpq_log.jsonl"
END_PASS = "the end pass"  # in the journal, behind the units


@dataclass(frozen=True)
class Outcome:
    """Result of a job.

    Attributes:
        plan: the plan that was carried out; its own attributes can still be read here, with a DeprecationWarning.
        measured: the card's figures, or why there are none.
        tested: what the self-test did, in words.
        rounded: layers that were rounded to nearest for want of statistics, such as experts without a token.
        end_pass: the record of the end pass, if there was one.
    """

    plan: Plan
    measured: CardFigures | str
    tested: str
    rounded: tuple[str, ...] = ()
    end_pass: EndPass | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self.plan, name)
        warnings.warn(f"afpq.quantize returns an Outcome now: read .plan.{name}", DeprecationWarning, stacklevel=2)
        return value


def check_memory(job: Job, work: WorkDirectory) -> None:
    """Raises AfpqError, before anything is computed, if an end pass is to come and has no room for both models."""
    if not job.plan.recipe.end_pass or END_PASS in work.finished:
        return
    device = job.settings.torch_device()
    cuda = device.type == "cuda"
    needed, free = end_pass_bytes(job.plan), available_device_memory(device) if cuda else available_memory()
    if needed > free:
        raise AfpqError(
            f"the end pass holds the original and the result in memory, about {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free. Do without --end-pass"
        )


def _run_end_pass(job: Job, work: WorkDirectory, progress: Progress | None) -> None:
    """Run the end pass, if there is one. Its tensors are written to a file of their own first, so a killed run cannot
    mix them with those before.
    """
    if not job.plan.recipe.end_pass or END_PASS in work.finished:
        return
    file, outputs = work.scratch / "end_pass.safetensors", job.plan.outputs()
    if not file.exists():
        tensors, ended = _tuned(job, work, progress)
        write_whole(file, save(tensors, {"record": json.dumps(ended.to_json())}))
    with safe_open(file, "pt") as content, ShardWriter(work.path, outputs, written=outputs) as writer:
        record = json.loads(content.metadata()["record"])
        digests = {}
        for name in content.keys():  # noqa: SIM118  (not a dictionary)
            tensor = content.get_tensor(name)
            writer.write(name, tensor)
            digests[name] = digest(tensor)
    work.finish(END_PASS, [record], digests)


def _tuned(job: Job, work: WorkDirectory, progress: Progress | None) -> tuple[dict[str, Tensor], EndPass]:
    """Return the tensors that the end pass changes, by their names in the files, and its record."""
    plan, settings, trust = job.plan, job.settings, job.trust_remote_code
    assert job.windows is not None
    weights = sum(info.elements for info in plan.checkpoint.tensors.values())

    def advance(what: str, done: int, count: int) -> None:
        if progress is not None:
            progress(f"{what} {done} of {count}", weights, weights)

    places = vector_places(plan)
    outputs = plan.outputs()
    config = _config(job, settled(plan, work.schemes), None)
    with work.as_published(config) as directory, quiet_transformers():
        original = load_model(plan.checkpoint.directory, trust, str(settings.torch_device()))
        model = load_model(directory, trust, str(settings.torch_device()))
    vectors = {name: outputs[tensor][0] for name, tensor in places.items()}
    scales, found, ended = run_end_pass(
        model, original, job.windows, plan.recipe.end_pass, settings.seed, vectors, advance
    )
    prefixes = {target.module: target.prefix for target in plan.targets}
    tensors = {prefixes[m] + part: t for m, parts in scales.items() if m in prefixes for part, t in parts.items()}
    tensors |= {places[name]: vector for name, vector in found.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, ended


def finish_directory(job: Job, work: WorkDirectory, progress: Progress | None) -> Outcome:
    """Run the end pass and the self-test, and write all files next to the weights.

    config.json comes last: with it the directory is a model. Raises AfpqError if the self-test fails.
    """
    copy_companions(job.plan.checkpoint, work.path)  # the end pass loads the model, for which it may need its code
    _run_end_pass(job, work, progress)
    trust = job.trust_remote_code
    notes, ended = _notes(job.plan, work), _end_pass(work)
    plan = settled(job.plan, work.schemes)
    if job.choice is not None:
        write_json(work.path / SENSITIVITIES, job.choice.to_json())
    (work.path / LOG_NAME).write_text("\n".join(map(json.dumps, notes)) + "\n", "utf-8")
    config = _config(job, plan, ended)
    with work.as_published(config) as directory:
        written = open_checkpoint(directory)
        check_tensors(written, plan.outputs(), work.digests)
        write_checksums(work.path, plan.outputs(), work.digests, config)
        work.keep = True  # the weights are right: whatever is wrong now, they need not be computed again
        tested = work.public(check_reloaded(written, plan, job.model, work.digests, trust), directory)
        measured = _measured(job, directory, progress)
        measured = work.public(measured, directory) if isinstance(measured, str) else measured
    model = job.name or str(plan.checkpoint.directory)
    write_card(work.path, Card(model, job.plan, notes, _calibration(job, ended), measured, tested, job.choice))
    write_json(work.path / "config.json", config)
    return Outcome(job.plan, measured, tested, _rounded(notes, plan.recipe.method), ended)


def _rounded(notes: Sequence[dict[str, Any]], method: str) -> tuple[str, ...]:
    """The layers that a method without data stood in for, if `method` is calibrated."""
    if not METHODS[method].calibrated:
        return ()
    return tuple(note["module"] for note in notes if not METHODS[note["method"]].calibrated)


def _notes(plan: Plan, work: WorkDirectory) -> list[dict[str, Any]]:
    """The logs of all layers, in the plan's order."""
    return [note for unit in plan.units for note in work.finished[unit.name]]


def _end_pass(work: WorkDirectory) -> EndPass | None:
    return EndPass(**work.finished[END_PASS][0]) if END_PASS in work.finished else None


def settled(plan: Plan, schemes: Mapping[str, str]) -> Plan:
    """Return the plan as carried out: targets with learned codebooks have the schemes in `schemes`, by module."""
    learned = [target.module for target in plan.targets if target.scheme.format.learned]
    return plan.with_schemes({module: parse_scheme(schemes[module]) for module in learned}) if learned else plan


def _measured(job: Job, directory: Path, progress: Progress | None) -> CardFigures | str:
    """The card's figures, or why there are none."""
    if isinstance(job.sample, str):
        return job.sample
    weights = sum(info.elements for info in job.plan.checkpoint.tensors.values())

    def advance(_: str, done: int, count: int) -> None:
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
