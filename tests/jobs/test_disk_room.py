# SPDX-License-Identifier: MIT
"""Room on the disk is asked for everything that a run puts there, before it begins."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from command_line import TEXT

from afpq import AfpqError, CalibrationSettings, Recipe, export, parse_scheme, quantize
from afpq.checkpoint.companions import companion_bytes
from afpq.checkpoint.work_directory import WorkDirectory
from afpq.jobs.disk_room import bytes_on_disk, tuned_bytes
from afpq.jobs.prepare import Job, Texts, prepare

NF4 = parse_scheme("nf4-asym-g64-log8")
SETTINGS = CalibrationSettings(samples=4, seq_len=32)
Usage = namedtuple("Usage", "total used free")


def job(directory: Path, **recipe: Any) -> Job:
    return prepare(directory, Recipe(NF4, **recipe), Texts(TEXT, evaluate=False), settings=SETTINGS)


def test_companions_states_and_the_end_pass_count(tiny_copy: Path) -> None:
    plain = bytes_on_disk(job(tiny_copy))
    assert plain == job(tiny_copy).plan.output_bytes + companion_bytes(job(tiny_copy).plan.checkpoint)
    (tiny_copy / "merges.txt").write_bytes(bytes(5000))
    assert bytes_on_disk(job(tiny_copy)) == plain + 5000
    states = 4 * 32 * 64 * 4  # windows, tokens, width, float32
    assert bytes_on_disk(job(tiny_copy, method="gptq")) >= plain + 5000 + 2 * states
    assert bytes_on_disk(job(tiny_copy, end_pass=2)) == plain + 5000 + tuned_bytes(job(tiny_copy).plan)


@pytest.mark.parametrize("recipe", [{}, {"method": "gptq"}, {"method": "tune"}, {"end_pass": 2}], ids=str)
def test_what_lies_there_at_the_end_of_a_run_fits(
    tiny_model_dir: Path, tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    finish = WorkDirectory.publish

    def publish(work: WorkDirectory) -> None:
        found.append(sum(path.stat().st_size for path in work.path.rglob("*") if path.is_file()))
        finish(work)

    monkeypatch.setattr(WorkDirectory, "publish", publish)
    quantize(
        tiny_model_dir, tmp_path / "out", "nf4-asym-g64-log8", text=TEXT, evaluate=False, settings=SETTINGS, **recipe
    )
    logs = 120_000  # logs, checksums, card, its picture and config: some kilobytes a layer
    assert found[0] <= bytes_on_disk(job(tiny_model_dir, **recipe)) + logs


def test_too_little_room_is_an_error_before_any_work(tiny_copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tiny_copy / "merges.txt").write_bytes(bytes(50_000))
    outputs = job(tiny_copy).plan.output_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, outputs + 20_000))
    with pytest.raises(AfpqError, match="MB free"):
        quantize(tiny_copy, tmp_path / "out", "nf4-asym-g64-log8", progress=lambda *_: pytest.fail("it works already"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_asks_for_its_companions_too(tiny_copy: Path, tmp_path: Path, monkeypatch: Any) -> None:
    quantize(tiny_copy, tmp_path / "q")
    (tmp_path / "q" / "merges.txt").write_bytes(bytes(10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**6))
    with pytest.raises(AfpqError, match="MB free"):
        export(tmp_path / "q", tmp_path / "out")
