# SPDX-License-Identifier: MIT
"""Jobs with a bit budget on the tiny model, and what was measured for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afpq import Recipe, parse_scheme
from afpq.jobs.bit_budget import make_budget
from afpq.jobs.prepare import BudgetSearch, CalibrationSettings, Job, Texts, prepare

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = CalibrationSettings(samples=6, seq_len=48)
FEW = ("nf2-asym-g64-log8", "nf3-asym-g64-log8", "nf4-sym-g64-log8", "nf4-asym-g32-log8")


def job(model: Path, bits: float, file: Path | None = None, method: str = "rtn", **changes: Any) -> Job:
    recipe = Recipe(parse_scheme("nf4-asym-g64-log8"), method, **changes)
    budget = make_budget(bits, FEW)
    search = BudgetSearch(budget, file)
    return prepare(model, recipe, Texts(TEXT, evaluate=False), settings=SETTINGS, search=search)


@pytest.fixture(scope="module")
def chosen(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job at 3.5 bits, and the file of what was measured for it."""
    file = tmp_path_factory.mktemp("sensitivities") / "losses.json"
    return job(tiny_model_dir, 3.5, file), file
