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

from afpq.budget import SENSITIVITIES, Budget, Choice, make_budget, settle_budget, with_choice
from afpq.calibrated import Calibration, run_calibrated
from afpq.card import Card, write_card
from afpq.checkpoint import ShardWriter, checkpoint_digest, digest, digest_value, write_json
from afpq.config import config_to_json
from afpq.data import sample_windows, tokenize
from afpq.decide import make_plan
from afpq.devices import find_device
from afpq.errors import AfpqError
from afpq.loading import load_tokenizer, window_length
from afpq.measure import Drawn, Sample, SampleFigures, measure_sample, sample_beside, sample_of
from afpq.pipeline import UnitResult, run
from afpq.plan import Plan
from afpq.scheme import DEFAULT_SCHEME, METHODS, Recipe, Scheme, parse_scheme, scheme_of_end
from afpq.selftest import check_reloaded, check_tensors
from afpq.sensitivity import Measuring, measured_windows
from afpq.skeleton import build_skeleton
from afpq.source import open_checkpoint
from afpq.version import __version__
from afpq.workdir import WorkDirectory, refuse_existing, work_directory

LOG_NAME = "afpq_log.jsonl"

Progress = Callable[[str, int, int], None]  # (unit just finished, weights done, weights in all)


@dataclass(frozen=True)
class CalibrationSettings:
    """`samples` random windows of `seq_len` tokens (cut to the model's context), drawn with `seed`.

    `all_experts`: every expert of a mixture learns from all tokens, not only from those routed to it.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    all_experts: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.seq_len < 2:
            raise AfpqError(f"calibration needs at least 1 sample of 2 tokens, got {self.samples} of {self.seq_len}")
        if not 0 <= self.seed < 2**63:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to 2^63 - 1")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """The device that computes. Raises AfpqError for one that is not here."""
        return find_device(self.device)

    def measuring(self, windows: Tensor, recipe: Recipe) -> Measuring:
        """How sensitivities are measured on some of the calibration windows, with scales found as they will be."""
        damp = recipe.gptq.damp if METHODS[recipe.method].solver == "gptq" else None
        return Measuring(measured_windows(windows), self.seed, self.torch_device(), recipe.search, damp)


@dataclass(frozen=True)
class Job:
    """A plan, the architecture it was made with, and the calibration windows [samples, tokens] its method needs.

    For the card: the model as the user named it, the calibration text's name, and what to measure on, or why not.
    """

    plan: Plan
    model: PreTrainedModel
    settings: CalibrationSettings
    windows: Tensor | None
    name: str | None = None
    text_name: str = "a text"
    sample: Sample | str = "no text was given"
    trust_remote_code: bool = False
    choice: Choice | None = None  # where the plan's schemes were chosen under a budget of bits

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for telling whether a stopped run may go on."""
        windows = b"" if self.windows is None else self.windows.numpy().tobytes()
        return {
            "version of afpq": __version__,
            "model": checkpoint_digest(self.plan.checkpoint),
            "setting": digest_value(
                [asdict(self.plan.recipe), asdict(self.settings) if self.windows is not None else None]
            ),
            "text": hashlib.sha256(windows).hexdigest(),
        }


@dataclass(frozen=True)
class Outcome:
    """How a job ended: the card's figures or why there are none, what the self-test did, and the layers that were
    rounded to nearest for want of anything to learn from, such as experts that no token was routed to.
    """

    measured: SampleFigures | str
    tested: str
    rounded: tuple[str, ...] = ()


def prepare(
    model: str | Path,
    recipe: Recipe,
    *,
    text: str | Sequence[str] | None = None,
    eval_text: str | Sequence[str] | None = None,
    names: tuple[str, str] = ("the text given", "the evaluation text given"),
    measured: bool = True,
    settings: CalibrationSettings | None = None,
    trust_remote_code: bool = False,
    budget: Budget | None = None,
    sensitivities: Path | None = None,
    progress: Progress | None = None,
) -> Job:
    """What `recipe` would do to the checkpoint `model` (a directory or hub id); reads headers and texts only.

    `names` of the two texts are for the card; without `measured` it has no figures of perplexity. With a `budget` the
    model is run on the text, block by block, to choose the schemes; what was measured is kept in `sensitivities`.
    Raises AfpqError for bad input, and where a calibrated method or a budget has no text.
    """
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    plan = make_plan(checkpoint, skeleton, recipe)
    settings, calibrated = settings or CalibrationSettings(), METHODS[recipe.method].calibrated
    needy = f"method {recipe.method}" if calibrated else "a budget of bits"
    if (calibrated or budget is not None) and text is None:
        raise AfpqError(f"{needy} needs calibration text: --text FILE or --dataset NAME")
    if (calibrated or budget is not None) and getattr(skeleton.config, "is_encoder_decoder", False):
        raise AfpqError(
            f"{type(skeleton).__name__} is an encoder-decoder: its decoder's blocks read the encoder's outputs too and "
            f"cannot be calibrated one after the other by {needy}; "
            f"use --method rtn{'' if budget is None else ' without a budget'}"
        )
    if eval_text is not None and not measured:
        raise AfpqError("a text to measure on (--eval-text) and no measuring (--no-card-measure): choose one")
    length = window_length(skeleton, settings.seq_len)

    def tokens(content: str | Sequence[str]) -> Tensor:
        tokenizer = load_tokenizer(checkpoint.directory, trust_remote_code)
        return tokenize(tokenizer, content if isinstance(content, str) else "\n\n".join(content))

    windows, drawn, choice = None, None, None
    sample: Sample | str = _NO_TEXT if measured else _SWITCHED_OFF
    if (calibrated or budget is not None) and text is not None:
        drawn = Drawn(tokens(text), settings.samples, length, settings.seed)
        windows = sample_windows(drawn.tokens, drawn.count, drawn.length, drawn.seed)
    if measured and eval_text is not None:
        sample = sample_of(tokens(eval_text), length, names[1])
    elif measured and drawn is not None:
        sample = sample_beside(drawn, names[0])
    elif measured and text is not None:
        sample = sample_of(tokens(text), length, f"{names[0]}, which played no part in quantizing")
    if budget is not None and windows is not None:
        choice = settle_budget(plan, skeleton, budget, settings.measuring(windows, recipe), sensitivities, progress)
        plan = make_plan(checkpoint, skeleton, with_choice(recipe, choice, plan, skeleton))
    windows = windows if calibrated else None
    return Job(plan, skeleton, settings, windows, str(model), names[0], sample, trust_remote_code, choice)


def sensitivities_file(out: Path, given: Path | None, resume: bool) -> Path:
    """Where sensitivities are kept while `out` is made: beside it, unless a place was given.

    Raises AfpqError where `out` exists, before anything is measured.
    """
    refuse_existing(out)
    if given is not None:
        return given
    file = out.absolute().with_name(f"{out.name}.sensitivities.json")
    if not resume:
        file.unlink(missing_ok=True)
    return file


_NO_TEXT, _SWITCHED_OFF = "no text was given (--eval-text FILE)", "it was switched off (--no-card-measure)"


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = DEFAULT_SCHEME,
    *,
    method: str = "rtn",
    text: str | Sequence[str] | None = None,
    eval_text: str | Sequence[str] | None = None,
    measured: bool = True,
    settings: CalibrationSettings | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    lm_head: str | Scheme | bool | None = None,
    embedding: str | Scheme | bool | None = None,
    bits_per_weight: float | None = None,
    candidates: Sequence[str | Scheme] | None = None,
    sensitivities: str | Path | None = None,
    **recipe: Any,
) -> Plan:
    """Quantize a checkpoint (a directory or a hub id) into the new directory `out`; returns the plan carried out.

    `text` is what calibrated methods learn from: a string or a list of them. The card's perplexity and KL are measured
    on `eval_text`, or else on parts of `text` that were not used; `measured=False` does without. `recipe` takes the
    other fields of Recipe, such as `scale_search`, `skip` and `overrides`; `lm_head` and `embedding` are schemes for
    the ends of the model, True for the same as in its blocks. With `bits_per_weight` every group of layers gets the one
    of the `candidates` that keeps the predicted KL least under this budget, and `scheme` is for the ends alone;
    `sensitivities` names a file of what was measured for it, to be used again. `out` appears only when complete; a run
    that was stopped goes on where it stopped when called again. Raises AfpqError for bad input.
    """
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    recipe |= {"lm_head": scheme_of_end(lm_head, scheme), "embedding": scheme_of_end(embedding, scheme)}
    budget = make_budget(bits_per_weight, candidates)
    given = None if sensitivities is None else Path(sensitivities)
    file = None if budget is None else sensitivities_file(Path(out), given, resume)
    job = prepare(
        model,
        Recipe(scheme, method, **recipe),
        text=text,
        eval_text=eval_text,
        measured=measured,
        settings=settings,
        trust_remote_code=trust_remote_code,
        budget=budget,
        sensitivities=file,
        progress=progress,
    )
    execute(job, Path(out), resume=resume, progress=progress)
    if file is not None and given is None:
        file.unlink(missing_ok=True)  # the result holds it
    return job.plan


def execute(job: Job, out: Path, *, resume: bool = True, progress: Progress | None = None) -> Outcome:
    """Carry out a job into the new directory `out`, going on from OUT.partial if the same job was stopped there.

    The result gets its name once it has passed the self-test and has its card. Raises AfpqError where it does not pass.
    """
    with work_directory(out, job.plan.output_bytes, job.fingerprint(), resume) as work:
        _write_weights(job, work, progress)
        return _complete(job, work, progress)


def _write_weights(job: Job, work: WorkDirectory, progress: Progress | None) -> None:
    plan, infos = job.plan, job.plan.checkpoint.tensors
    sizes = {unit.name: sum(infos[name].elements for name in unit.tensors) for unit in plan.units}
    written = [name for unit in plan.units if unit.name in work.finished for name in plan.unit_outputs(unit)]
    with ShardWriter(work.path, plan.outputs(), written=written) as writer:
        for result in _results(job, work.scratch, frozenset(work.finished)):
            digests = {}
            for name, tensor in result.tensors:
                writer.write(name, tensor)
                digests[name] = digest(tensor)
            writer.sync()
            work.finish(result.unit.name, [log.to_json() for log in result.logs], digests)
            if progress is not None:
                done = sum(sizes[name] for name in work.finished)
                progress(_describe(result), done, sum(sizes.values()))


def _results(job: Job, scratch: Path, finished: frozenset[str]) -> Iterator[UnitResult]:
    if job.windows is None:
        return run(job.plan, finished)
    calibration = Calibration(job.windows, scratch, job.settings.torch_device(), job.settings.all_experts)
    return run_calibrated(job.plan, job.model, calibration, finished)


def _describe(result: UnitResult) -> str:
    """The unit, and the mean relative error of its layers."""
    errors = [log.weight_error if log.output_error is None else log.output_error for log in result.logs]
    return f"{result.unit.name} error {sum(errors) / len(errors):.2e}" if errors else result.unit.name


def _complete(job: Job, work: WorkDirectory, progress: Progress | None) -> Outcome:
    """Everything beside the weights; config.json comes last: with it the directory is a model."""
    plan, trust = job.plan, job.trust_remote_code
    notes = [note for unit in plan.units for note in work.finished[unit.name]]
    if job.choice is not None:
        write_json(work.path / SENSITIVITIES, job.choice.to_json())
    (work.path / LOG_NAME).write_text("\n".join(map(json.dumps, notes)) + "\n", "utf-8")
    for path in plan.checkpoint.companions():
        shutil.copyfile(path, work.path / path.name)
    config = _config(job)
    with work.as_published(config) as directory:
        written = open_checkpoint(directory)
        check_tensors(written, plan.outputs(), work.digests)
        work.keep = True  # the weights are right: whatever is wrong now, they need not be computed again
        tested = check_reloaded(written, plan, job.model, trust)
        measured = _measured(job, directory, progress)
    model = job.name or str(plan.checkpoint.directory)
    write_card(work.path, Card(model, plan, notes, _calibration(job), measured, tested, job.choice))
    write_json(work.path / "config.json", config)
    rounded = tuple(note["module"] for note in notes if note["method"] != plan.recipe.method)
    return Outcome(measured, tested, rounded)


def _measured(job: Job, directory: Path, progress: Progress | None) -> SampleFigures | str:
    """The card's figures, or why there are none."""
    if isinstance(job.sample, str):
        return job.sample
    weights = sum(info.elements for info in job.plan.checkpoint.tensors.values())

    def advance(done: int, count: int) -> None:
        if progress is not None:
            progress(f"measuring {done} of {count}", weights, weights)

    device = job.settings.torch_device()
    return measure_sample(job.plan, directory, job.sample, device, job.trust_remote_code, advance)


def _config(job: Job) -> dict[str, Any]:
    """config.json of the result."""
    keys = config_to_json(job.plan.recipe, job.plan.kept)
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
    keys["made_by"] = f"afpq {__version__}"
    return {**job.plan.checkpoint.config, "quantization_config": keys}


def _calibration(job: Job) -> str | None:
    """How the method was calibrated, for the card."""
    if job.windows is None:
        return None
    count, length = job.windows.shape
    return f"Calibration: {count} windows of {length} tokens of {job.text_name}, seed {job.settings.seed}."
