# SPDX-License-Identifier: MIT
"""Prepare a job: the plan of a recipe for a checkpoint, and its calibration text; from headers and texts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from afpq.algorithms.methods import METHODS, NEAREST
from afpq.calibration.sensitivity import SensitivitySettings, measured_windows
from afpq.checkpoint.companions import refuse_adapter
from afpq.checkpoint.fingerprint import BUDGET, CODE_BOOKS, DRAWN_BY, SETTINGS, TEXT, code_books, recipe_settings
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.verify import checkpoint_digest
from afpq.checkpoint.work_directory import refuse_existing
from afpq.errors import AfpqError
from afpq.evaluation.devices import find_device
from afpq.evaluation.loading import load_tokenizer, require_next_token, require_text, window_length
from afpq.evaluation.text import sample_windows, tokenize
from afpq.jobs.bit_budget import Budget, Choice, settle_budget
from afpq.jobs.card_sample import CardText, WindowDraw, card_text_of, unused_card_text
from afpq.jobs.chosen_overrides import with_choice
from afpq.jobs.finite_values import check_kept
from afpq.model.skeleton import build_skeleton
from afpq.progress import Progress
from afpq.recipe import Recipe
from afpq.version import __version__

_NO_TEXT, _SWITCHED_OFF = "no text was given (--eval-text FILE)", "it was switched off (--no-card-measure)"


@dataclass(frozen=True)
class CalibrationSettings:
    """`samples` random windows of `seq_len` tokens (cut to the model's context), drawn with `seed`.

    `all_experts`: the statistics of every expert of a mixture are those of all tokens, not only of the ones routed to
    it. Raises AfpqError for numbers out of range and for a device that is not here.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    device: str = "auto"
    all_experts: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise AfpqError(f"samples {self.samples}: calibration needs at least one")
        if self.seq_len < 2:
            raise AfpqError(f"sequence length {self.seq_len}: calibration needs windows of at least 2 tokens")
        if not 0 <= self.seed < 2**63:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to 2^63 - 1")
        self.torch_device()

    def torch_device(self) -> torch.device:
        """Return the device that computes. Raises AfpqError for one that is not here."""
        return find_device(self.device)

    def measuring(self, windows: Tensor, recipe: Recipe) -> SensitivitySettings:
        """Return how to measure sensitivities on some of the calibration windows, with scales found as in the run."""
        traits = recipe.traits
        return SensitivitySettings(
            measured_windows(windows), self.seed, self.torch_device(), recipe.search, traits.damp, traits.gradients
        )


@dataclass(frozen=True)
class Job:
    """A plan, the architecture it was made with, and the calibration windows [samples, tokens] its method needs.

    For the card: the model as the user named it, the calibration text's name, and the text to measure on, or why there
    is none.
    """

    plan: Plan
    model: PreTrainedModel
    settings: CalibrationSettings
    windows: Tensor | None
    name: str | None = None
    text_name: str = "a text"
    sample: CardText | str = "no text was given"
    trust_remote_code: bool = False
    choice: Choice | None = None  # if the plan's schemes were chosen under a budget of bits

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that decides the result: the settings as data, the rest as digests.

        A stopped run goes on only if they are equal.
        """
        recipe = self.plan.recipe
        windows = b"" if self.windows is None else self.windows.numpy().tobytes()
        return {
            "version of afpq": __version__,
            "model": checkpoint_digest(self.plan.checkpoint),
            CODE_BOOKS: code_books(recipe),
            SETTINGS: {
                **recipe_settings(recipe),
                **(_drawing(self.settings) if self.windows is not None else {}),
                BUDGET: None if self.choice is None else self.choice.budget.bits_per_weight,
            },
            TEXT: hashlib.sha256(windows).hexdigest(),
        }


def _drawing(settings: CalibrationSettings) -> dict[str, Any]:
    samples, length, seed = DRAWN_BY
    return {
        samples: settings.samples,
        length: settings.seq_len,
        seed: settings.seed,
        "device": settings.device,
        "use of all experts": settings.all_experts,
    }


@dataclass(frozen=True)
class Texts:
    """The texts of a job: `calibration` for methods that need one, `evaluation` to measure the result on.

    `calibration_name` and `evaluation_name` are for the card. Without `evaluate` the card has no perplexity or KL.
    Raises AfpqError for an evaluation text that is not to be evaluated on.
    """

    calibration: str | Sequence[str] | None = None
    evaluation: str | Sequence[str] | None = None
    calibration_name: str = "the text given"
    evaluation_name: str = "the evaluation text given"
    evaluate: bool = True

    def __post_init__(self) -> None:
        if self.evaluation is not None and not self.evaluate:
            raise AfpqError("a text to measure on (--eval-text) and no measuring (--no-card-measure): choose one")


@dataclass(frozen=True)
class BudgetSearch:
    """A budget of bits, and the file that keeps the sensitivities measured for it; None: they are not kept."""

    budget: Budget
    file: Path | None = None


@dataclass(frozen=True)
class _Reader:
    """Tokenizes texts for one model, `length` tokens a window at most."""

    directory: Path
    trust_remote_code: bool
    length: int

    def tokens(self, content: str | Sequence[str]) -> Tensor:
        tokenizer = load_tokenizer(self.directory, self.trust_remote_code)
        return tokenize(tokenizer, content if isinstance(content, str) else "\n\n".join(content))


def prepare(
    model: str | Path,
    recipe: Recipe,
    texts: Texts | None = None,
    *,
    settings: CalibrationSettings | None = None,
    trust_remote_code: bool = False,
    search: BudgetSearch | None = None,
    progress: Progress | None = None,
) -> Job:
    """Plan what `recipe` does to the checkpoint `model` (a directory or hub id); read headers and texts only.

    With a budget to `search` schemes for, the model is run on the calibration text, block by block, to choose them.
    Raises AfpqError for bad input, and if a calibrated method, a budget or the end pass has no text.
    """
    texts, settings = texts or Texts(), settings or CalibrationSettings()
    refuse_adapter(Path(model))
    checkpoint = open_checkpoint(model)
    refuse_adapter(checkpoint.directory)
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    plan = make_plan(checkpoint, skeleton, recipe)
    if settings.all_experts and not any(target.expert for target in plan.targets):
        raise AfpqError(f"--all-experts has no effect: {type(skeleton).__name__} has no experts that are quantized")
    calibrated = METHODS[recipe.method].calibrated
    user = _user_of_text(recipe, search)
    if user is not None:
        plan.require_targets(user)
        _check_calibration(skeleton, texts, user, "" if search is None else " without a budget")
    if recipe.end_pass:
        require_next_token(skeleton)
    reader = _Reader(checkpoint.directory, trust_remote_code, window_length(skeleton, settings.seq_len))
    drawn = None if user is None else _draw(reader, texts, settings)
    windows = None if drawn is None else sample_windows(drawn.tokens, drawn.count, drawn.length, drawn.seed)
    if recipe.end_pass and windows is not None and len(windows) < 2:
        raise AfpqError("the end pass needs 2 windows, one to learn from and one to judge by: more --samples or text")
    sample, choice = _card_text(reader, texts, drawn), None
    if search is not None and windows is not None:
        how = settings.measuring(windows, recipe)
        check_kept(plan, skeleton)
        choice = settle_budget(plan, skeleton, search.budget, how, search.file, progress)
        plan = make_plan(checkpoint, skeleton, with_choice(recipe, choice, plan, skeleton))
    windows = windows if calibrated or recipe.end_pass else None
    name = texts.calibration_name
    return Job(plan, skeleton, settings, windows, str(model), name, sample, trust_remote_code, choice)


def _user_of_text(recipe: Recipe, search: BudgetSearch | None) -> str | None:
    """What needs calibration text, in words; None if nothing does."""
    if METHODS[recipe.method].calibrated:
        return f"method {recipe.method}"
    if search is not None:
        return "a budget of bits"
    return "the end pass" if recipe.end_pass else None


def _check_calibration(skeleton: PreTrainedModel, texts: Texts, user: str, without: str) -> None:
    """Raises AfpqError if there is no text for `user`, or the architecture cannot be calibrated."""
    if texts.calibration is None:
        raise AfpqError(f"{user} needs calibration text: --text FILE or --dataset NAME")
    if not getattr(skeleton.config, "is_encoder_decoder", False):
        require_text(skeleton, user)
    else:
        raise AfpqError(
            f"{type(skeleton).__name__} is an encoder-decoder: its decoder's blocks read the encoder's outputs too and "
            f"cannot be calibrated one after the other by {user}; use --method {NEAREST}{without}"
        )


def _draw(reader: _Reader, texts: Texts, settings: CalibrationSettings) -> WindowDraw:
    assert texts.calibration is not None
    return WindowDraw(reader.tokens(texts.calibration), settings.samples, reader.length, settings.seed)


def _card_text(reader: _Reader, texts: Texts, drawn: WindowDraw | None) -> CardText | str:
    """The text that the card's figures are measured on, or why there is none."""
    if not texts.evaluate:
        return _SWITCHED_OFF
    if texts.evaluation is not None:
        return card_text_of(reader.tokens(texts.evaluation), reader.length, texts.evaluation_name)
    if drawn is not None:
        return unused_card_text(drawn, texts.calibration_name)
    if texts.calibration is not None:
        origin = f"{texts.calibration_name}, which played no part in quantizing"
        return card_text_of(reader.tokens(texts.calibration), reader.length, origin)
    return _NO_TEXT


def sensitivities_file(out: Path, given: Path | None, resume: bool) -> Path:
    """Return the file that keeps sensitivities while `out` is made: next to it, unless a place was given.

    Raises AfpqError if `out` exists, before anything is measured.
    """
    refuse_existing(out)
    if given is not None:
        return given
    file = out.absolute().with_name(f"{out.name}.sensitivities.json")
    if not resume:
        file.unlink(missing_ok=True)
    return file
