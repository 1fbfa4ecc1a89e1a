# SPDX-License-Identifier: MIT
"""The cells that a comparison has to measure, decided and checked before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.atomic_files import digest_value
from afpq.checkpoint.fingerprint import CODE_BOOKS, SETTINGS
from afpq.checkpoint.make_plan import make_plan
from afpq.comparison.cells import CALIBRATION, FLOAT, Cell, Fingerprint
from afpq.comparison.peers import Peer, installed_peers
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_tokenizer, window_length
from afpq.evaluation.text import tokenize, windows
from afpq.jobs.prepare import CalibrationSettings, Job, Texts, prepare
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe
from afpq.version import __version__


@dataclass(frozen=True)
class Question:
    """The models to compare, and the text to measure on. `schemes` and `methods` are text forms; `text` is measured on.

    `seq_len` and `max_tokens` cut the text into windows; `settings` are for the calibrated methods. With `peers`, other
    tools that are installed are measured too; with `keep` the quantized models stay. The names are for the report.
    """

    model: str
    schemes: Sequence[str]
    methods: Sequence[str]
    text: str
    calibration_text: str | None = None
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    seq_len: int = 2048
    max_tokens: int | None = None
    text_name: str = "the text"
    calibration_name: str = "the calibration text"
    peers: bool = False
    keep: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Task:
    """One cell to measure: by our own job, by another tool, or (neither) the float model; and what decides it."""

    cell: Cell
    fingerprint: Fingerprint
    job: Job | None = None
    peer: Peer | None = None


@dataclass(frozen=True)
class Agenda:
    """All cells that were asked for, the windows of text [count, length], and what had to be left out, in words."""

    tasks: list[Task]
    windows: Tensor
    first: Job
    left_out: list[str]


def make_agenda(question: Question) -> Agenda:
    """Check everything before any work. Raises AfpqError for the first thing that is wrong."""
    schemes, methods = _unique(question.schemes, "--schemes"), _unique(question.methods, "--methods")
    recipes = [Recipe(parse_scheme(scheme), method) for method in methods for scheme in schemes]
    if question.calibration_text is None and any(METHODS[recipe.method].calibrated for recipe in recipes):
        method = next(m for m in methods if METHODS[m].calibrated)
        raise AfpqError(f"method {method} needs calibration text: --calibration-text FILE")
    peers = installed_peers() if question.peers else []
    bases: dict[bool, Job] = {}  # calibration text is read once, and headers twice
    for recipe in recipes:
        if METHODS[recipe.method].calibrated not in bases:
            bases[METHODS[recipe.method].calibrated] = _prepare(question, recipe)
    first = next(iter(bases.values()))
    first.plan.require_targets("a comparison")
    text = _windows(question, first)
    common = {
        "version of afpq": __version__,
        "model": first.fingerprint()["model"],
        "text": hashlib.sha256(f"{tuple(text.shape)}".encode() + text.numpy().tobytes()).hexdigest(),
    }
    tasks = [Task(FLOAT, common)]
    for recipe in recipes:
        base = bases[METHODS[recipe.method].calibrated]
        job = replace(base, plan=make_plan(base.plan.checkpoint, base.model, recipe))
        tasks.append(Task(Cell(str(recipe.scheme), recipe.method), common | _fingerprint(job), job))
    fitting = [peer for peer in peers if not any(t.shape[1] % peer.multiple for t in first.plan.targets)]
    tasks += [
        Task(Cell(p.scheme, p.package), common | {"version of the tool": str(p.version)}, peer=p) for p in fitting
    ]
    left_out = [f"{p.package} {p.scheme}: the model's rows are no multiple of it" for p in peers if p not in fitting]
    return Agenda(tasks, text, first, left_out)


def _unique(names: Sequence[str], option: str) -> list[str]:
    found = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not found:
        raise AfpqError(f"{option}: give at least one, or several separated by commas")
    return found


def _prepare(question: Question, recipe: Recipe) -> Job:
    trust = question.trust_remote_code
    text, settings = question.calibration_text, question.settings
    return prepare(question.model, recipe, Texts(text), settings=settings, trust_remote_code=trust)


def _windows(question: Question, job: Job) -> Tensor:
    """Cut the text into windows; raises AfpqError if it is shorter than one, whose figures would mislead."""
    tokenizer = load_tokenizer(job.plan.checkpoint.directory, question.trust_remote_code)
    tokens = tokenize(tokenizer, question.text)[: question.max_tokens]
    length = window_length(job.model, question.seq_len)
    result = windows(tokens, length, question.max_tokens)
    if result.shape[1] < length:
        raise AfpqError(
            f"a text of {len(tokens)} tokens is shorter than a window of {length}; "
            f"give more text, or --seq-len {len(tokens)} or less"
        )
    return result


def _fingerprint(job: Job) -> Fingerprint:
    """Return what decides a cell of ours besides the model and the text measured on."""
    parts = job.fingerprint()
    calibration = {CALIBRATION: parts["text"]} if job.windows is not None else {}
    return {"setting": digest_value([parts[CODE_BOOKS], parts[SETTINGS]]), **calibration}
