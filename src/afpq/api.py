# SPDX-License-Identifier: MIT
"""`afpq.quantize`: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from afpq.calibrated import Calibration, run_calibrated
from afpq.checkpoint import ShardWriter, write_json
from afpq.config import config_to_json
from afpq.data import sample_windows, tokenize
from afpq.devices import find_device
from afpq.errors import AfpqError
from afpq.loading import context_length, load_tokenizer
from afpq.pipeline import UnitResult, run
from afpq.plan import Plan, make_plan
from afpq.scheme import METHODS, Recipe, Scheme, parse_scheme
from afpq.skeleton import build_skeleton
from afpq.source import open_checkpoint
from afpq.version import __version__
from afpq.workdir import work_directory

LOG_NAME = "afpq_log.jsonl"

Progress = Callable[[str, int, int], None]  # (unit just finished, weights done, weights in all)


@dataclass(frozen=True)
class CalibrationSettings:
    """`samples` random windows of `seq_len` tokens (cut to the model's context), drawn with `seed`."""

    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 2:
            raise AfpqError(f"calibration needs at least 1 sample of 2 tokens, got {self.samples} of {self.seq_len}")
        if not 0 <= self.seed < 2**63:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to 2^63 - 1")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device that computes. Raises AfpqError for one that is not here."""
        return find_device(self.device)


@dataclass(frozen=True)
class Job:
    """A plan, the architecture it was made with, and the calibration windows [samples, tokens] its method needs."""

    plan: Plan
    model: PreTrainedModel
    settings: CalibrationSettings
    windows: Tensor | None

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for telling whether a stopped run may go on."""
        checkpoint = self.plan.checkpoint
        files = sorted({info.file for info in checkpoint.tensors.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        windows = b"" if self.windows is None else self.windows.numpy().tobytes()
        return {
            "version of afpq": __version__,
            "model": _digest([str(checkpoint.directory.resolve()), stats, checkpoint.config]),
            "setting": _digest([asdict(self.plan.recipe), asdict(self.settings) if self.windows is not None else None]),
            "text": hashlib.sha256(windows).hexdigest(),
        }


def prepare(
    model: str | Path,
    recipe: Recipe,
    *,
    text: str | Sequence[str] | None = None,
    settings: CalibrationSettings | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """What `recipe` would do to the checkpoint `model` (a directory or hub id); reads headers and `text` only.

    Raises AfpqError for bad input, and where a calibrated method has no text.
    """
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    plan = make_plan(checkpoint, skeleton, recipe)
    settings, windows = settings or CalibrationSettings(), None
    if METHODS[recipe.method].calibrated:
        if text is None:
            raise AfpqError(f"method {recipe.method} needs calibration text: --text FILE or --dataset NAME")
        tokenizer = load_tokenizer(checkpoint.directory, trust_remote_code)
        tokens = tokenize(tokenizer, text if isinstance(text, str) else "\n\n".join(text))
        length = min(settings.seq_len, context_length(skeleton) or settings.seq_len)
        windows = sample_windows(tokens, settings.samples, length, settings.seed)
    return Job(plan, skeleton, settings, windows)


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = "nf4-asym-g128",
    *,
    method: str = "rtn",
    text: str | Sequence[str] | None = None,
    settings: CalibrationSettings | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **recipe: Any,
) -> Plan:
    """Quantize a checkpoint (a directory or a hub id) into the new directory `out`; returns the plan carried out.

    `text` is what calibrated methods learn from: a string or a list of them. `recipe` takes the other fields of
    Recipe, such as `scale_search`, `skip` and `overrides`. `out` appears only when complete; a run that was stopped
    goes on where it stopped when called again. Raises AfpqError for bad input.
    """
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    job = prepare(
        model, Recipe(scheme, method, **recipe), text=text, settings=settings, trust_remote_code=trust_remote_code
    )
    execute(job, Path(out), resume=resume, progress=progress)
    return job.plan


def execute(job: Job, out: Path, *, resume: bool = True, progress: Progress | None = None) -> None:
    """Carry out a job into the new directory `out`, going on from OUT.partial if the same job was stopped there."""
    plan, outputs = job.plan, job.plan.outputs()
    infos = plan.checkpoint.tensors
    sizes = {unit.name: sum(infos[name].elements for name in unit.tensors) for unit in plan.units}
    with work_directory(out, plan.output_bytes, job.fingerprint(), resume) as work:
        written = [name for unit in plan.units if unit.name in work.finished for name in plan.unit_outputs(unit)]
        with ShardWriter(work.path, outputs, written=written) as writer:
            for result in _results(job, work.scratch, frozenset(work.finished)):
                for name, tensor in result.tensors:
                    writer.write(name, tensor)
                writer.sync()
                work.finish(result.unit.name, [log.to_json() for log in result.logs])
                if progress is not None:
                    done = sum(sizes[name] for name in work.finished)
                    progress(_describe(result), done, sum(sizes.values()))
        lines = [json.dumps(note) for unit in plan.units for note in work.finished[unit.name]]
        (work.path / LOG_NAME).write_text("\n".join(lines) + "\n", "utf-8")
        _write_companions(job, work.path)


def _results(job: Job, scratch: Path, finished: frozenset[str]) -> Iterator[UnitResult]:
    if job.windows is None:
        return run(job.plan, finished)
    calibration = Calibration(job.windows, scratch, job.settings.torch_device())
    return run_calibrated(job.plan, job.model, calibration, finished)


def _describe(result: UnitResult) -> str:
    """The unit, and the mean relative error of its layers."""
    errors = [log.weight_error if log.output_error is None else log.output_error for log in result.logs]
    return f"{result.unit.name} error {sum(errors) / len(errors):.2e}" if errors else result.unit.name


def _write_companions(job: Job, directory: Path) -> None:
    """Tokenizer and the rest, then config.json: with it the directory is a model."""
    plan = job.plan
    for path in plan.checkpoint.companions():
        shutil.copyfile(path, directory / path.name)
    keys = config_to_json(plan.recipe, plan.kept)
    if job.windows is not None:
        keys["calibration"] = {
            "samples": job.windows.shape[0],
            "seq_len": job.windows.shape[1],
            "seed": job.settings.seed,
            "sha256": hashlib.sha256(job.windows.numpy().tobytes()).hexdigest(),
        }
    keys["made_by"] = f"afpq {__version__}"
    write_json(directory / "config.json", {**plan.checkpoint.config, "quantization_config": keys})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
