# SPDX-License-Identifier: MIT
"""OUT.partial: published whole, kept for resuming, refused when begun otherwise."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from afpq.checkpoint.work_directory import JOURNAL, work_directory
from afpq.errors import AfpqError

PRINT = {"model": "a", "setting": "b", "text": "c"}


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def stop_after_one_unit(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), work_directory(out, 0, PRINT, True) as work:
        (work.path / "weights").write_text("half")
        work.finish("first", [{"error": 1}])
        raise KeyboardInterrupt


def test_published_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with work_directory(out, 0, PRINT, True) as work:
        (work.path / "config.json").write_text("{}")
        (work.scratch / "states").write_text("scratch")
        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["config.json"]
    assert not partial(out).exists()


def test_a_stopped_run_is_found_again_with_its_notes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_after_one_unit(out)
    assert not out.exists()
    with work_directory(out, 0, PRINT, True) as work:
        assert work.finished == {"first": [{"error": 1}]}
        assert (work.path / "weights").read_text() == "half"
    assert (out / "weights").exists()


def test_nothing_finished_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_directory(out, 0, PRINT, True):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", list(PRINT))
def test_another_job_is_refused_with_the_reason(tmp_path: Path, key: str) -> None:
    out = tmp_path / "out"
    stop_after_one_unit(out)
    with pytest.raises(AfpqError, match=f"another {key};.*--no-resume"):
        with work_directory(out, 0, {**PRINT, key: "changed"}, True):
            raise AssertionError("must not start")
    assert (partial(out) / "weights").exists()
    with work_directory(out, 0, {**PRINT, key: "changed"}, False) as work:
        assert work.finished == {} and not (work.path / "weights").exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    stop_after_one_unit(out)
    journal = partial(out) / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"unit": "second", "notes": []}\n'[:cut])
    with work_directory(out, 0, PRINT, True) as work:
        assert list(work.finished) == ["first"]
        work.finish("second", [])
        assert len(journal.read_text().splitlines()) == 3


def test_bad_input_discards_a_new_run_and_keeps_an_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AfpqError), work_directory(out, 0, PRINT, True) as work:
        work.finish("first", [])
        raise AfpqError("NaN")
    assert list(tmp_path.iterdir()) == []
    stop_after_one_unit(out)
    with pytest.raises(AfpqError), work_directory(out, 0, PRINT, True):
        raise AfpqError("NaN")
    assert partial(out).exists()


def test_an_existing_output_is_never_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(AfpqError, match="exists already"), work_directory(out, 0, PRINT, True):
        raise AssertionError("must not start")
    assert (out / "precious").read_text() == "data"


def test_a_small_disk_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("afpq.checkpoint.work_directory.shutil.disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(AfpqError, match="free"), work_directory(tmp_path / "out", 11, PRINT, True):
        raise AssertionError("must not start")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="No space left"), work_directory(tmp_path / "out", 0, PRINT, True):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not (tmp_path / "out").exists()
