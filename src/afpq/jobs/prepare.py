# SPDX-License-Identifier: MIT
"""A job: what a recipe would do to a checkpoint, with the text it learns from; made from headers and texts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from afpq.calibration.sensitivity import SensitivitySettings, measured_windows
from afpq.checkpoint.atomic_files import digest_value
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.verify import checkpoint_digest
from afpq.checkpoint.work_directory import refuse_existing
from afpq.errors import AfpqError
from afpq.evaluation.devices import find_device
from afpq.evaluation.loading import load_tokenizer, require_next_token, window_length
from afpq.evaluation.text import sample_windows, tokenize
from afpq.jobs.bit_budget import Budget, Choice, settle_budget, with_choice
from afpq.jobs.card_sample import CardText, WindowDraw, card_text_of, unused_card_text
from afpq.jobs.finite_values import check_kept
from afpq.model.skeleton import build_skeleton
from afpq.recipe import METHODS, Recipe
from afpq.version import __version__

Progress = Callable[[str, int, int], None]  # (unit just finished, weights done, weights in all)
_NO_TEXT, _SWITCHED_OFF = "no text was given (--eval-text FILE)", "it was switched off (--no-card-measure)"


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

    def measuring(self, windows: Tensor, recipe: Recipe) -> SensitivitySettings:
        """How sensitivities are measured on some of the calibration windows, with scales found as they will be."""
        method = METHODS[recipe.method]
        damp = recipe.gptq.damp if method.solver == "gptq" else None
        return SensitivitySettings(
            measured_windows(windows), self.seed, self.torch_device(), recipe.search, damp, method.guided
        )


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
    sample: CardText | str = "no text was given"
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
    if recipe.end_pass:
        require_next_token(skeleton)
    needy = f"method {recipe.method}" if calibrated else "a budget of bits" if budget is not None else "the end pass"
    taught = calibrated or budget is not None or recipe.end_pass > 0
    if taught and text is None:
        raise AfpqError(f"{needy} needs calibration text: --text FILE or --dataset NAME")
    if taught and getattr(skeleton.config, "is_encoder_decoder", False):
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
    sample: CardText | str = _NO_TEXT if measured else _SWITCHED_OFF
    if taught and text is not None:
        drawn = WindowDraw(tokens(text), settings.samples, length, settings.seed)
        windows = sample_windows(drawn.tokens, drawn.count, drawn.length, drawn.seed)
        if recipe.end_pass and len(windows) < 2:
            raise AfpqError(
                "the end pass needs 2 windows, one to learn from and one to judge by: more --samples or text"
            )
    if measured and eval_text is not None:
        sample = card_text_of(tokens(eval_text), length, names[1])
    elif measured and drawn is not None:
        sample = unused_card_text(drawn, names[0])
    elif measured and text is not None:
        sample = card_text_of(tokens(text), length, f"{names[0]}, which played no part in quantizing")
    if budget is not None and windows is not None:
        check_kept(plan, skeleton)
        choice = settle_budget(plan, skeleton, budget, settings.measuring(windows, recipe), sensitivities, progress)
        plan = make_plan(checkpoint, skeleton, with_choice(recipe, choice, plan, skeleton))
    windows = windows if calibrated or recipe.end_pass else None
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
