# SPDX-License-Identifier: MIT
"""What tests of comparisons share: a question about a model, a run of it, and results by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from afpq import CalibrationSettings
from afpq.comparison.cells import FLOAT, Cell, Result
from afpq.comparison.run import Comparison
from afpq.comparison.tasks import Agenda, Question, make_agenda
from afpq.evaluation.perplexity import Evaluation

TEXT = "The quick brown fox jumps over the lazy dog; größer als nötig.\n" * 6
SETTINGS = CalibrationSettings(4, 32, device="cpu")


def question(model: Path, **changes: Any) -> Question:
    plain = Question(str(model), ["nf3-asym-g64", "nf3-sym-g32"], ["rtn"], TEXT, None, SETTINGS, 32, 128)
    return replace(plain, **changes)


def run_comparison(asked: Question, directory: Path) -> tuple[list[Result], list[str], Agenda]:
    notes: list[str] = []
    agenda = make_agenda(asked)
    results = Comparison(asked, agenda, directory).run(lambda *_: None, notes.append)
    return results, notes, agenda


WINDOWS = [0.8, 1.4, 0.9, 1.1, 0.7, 1.3]


def result(scheme: str, method: str, bits: float, kl: float, shift: float = 0.0) -> Result:
    """KL of each window: `kl` times WINDOWS, which differ much, plus an alternating `shift`."""
    divergences = tuple(kl * w + shift * (-1) ** i for i, w in enumerate(WINDOWS))
    mean = sum(divergences) / len(divergences)
    losses = tuple(3 + d for d in divergences)
    evaluation = Evaluation(math.exp(3 + mean), 1.0, 600, mean, 0.1 * mean, 0.9)
    return Result(Cell(scheme, method), bits, 1.0, 1000, evaluation, losses, divergences)


ORIGINAL = Result(FLOAT, 16.0, 0.0, 4000, Evaluation(math.exp(3), 1.0, 600), (3.0,) * 6, ())
TWO = result("nf3-asym-g128", "rtn", 3.25, 0.0300)
HALF = result("nf3-sym-g64", "rtn", 3.25, 0.0330)
ZERO = result("int3-asym-g128", "rtn", 3.148, 0.0380)
