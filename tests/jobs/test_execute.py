# SPDX-License-Identifier: MIT
"""A job carried out unit by unit: progress, the journal with learned codebooks, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afpq import Recipe, parse_scheme
from afpq.checkpoint.reader import WEIGHTS
from afpq.checkpoint.work_directory import JOURNAL
from afpq.jobs.execute import execute
from afpq.jobs.prepare import Texts, prepare

LEARNED = Recipe(parse_scheme("learned2-sym-g64"), skip=("mlp",))


def test_progress_ends_with_all_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = prepare(tiny_model_dir, Recipe(parse_scheme("nf4-asym-g64")), Texts(evaluate=False))
    calls: list[tuple[str, int, int]] = []
    execute(job, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    total = sum(info.elements for info in job.plan.checkpoint.tensors.values())
    assert calls[-1][1:] == (total, total) and any(" error " in what for what, _, _ in calls)


def test_learned_codebooks_are_in_the_journal_and_a_stopped_run_goes_on_with_them(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("model.layers.1"):
            raise KeyboardInterrupt

    job = prepare(tiny_model_dir, LEARNED)
    execute(job, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        execute(job, tmp_path / "out", progress=stop)
    lines = [json.loads(line) for line in (tmp_path / "out.partial" / JOURNAL).read_text().splitlines()[1:]]
    schemes = {module: text for line in lines for module, text in line["schemes"].items()}
    notes = {note["module"]: note["scheme"] for line in lines for note in line["notes"]}
    assert len(schemes) == 8 and schemes == notes and all(text.startswith("lut:") for text in schemes.values())
    execute(job, tmp_path / "out")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
