# SPDX-License-Identifier: MIT
"""OUT.partial: published whole, kept for resuming, refused when begun otherwise."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afpq.checkpoint.work_directory import JOURNAL, WorkDirectory, work_directory
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


@contextlib.contextmanager
def working(out: Path, recipe: str = "a") -> Iterator[WorkDirectory]:
    with work_directory(out, 10, {"recipe": recipe}, resume=True) as work:
        yield work


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("error", [ValueError, AfpqError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with working(tmp_path / "out") as work:
            (work.path / "deep").mkdir()
            (work.path / "deep" / "file").write_text("x")
            raise error("stop")
    assert contents(tmp_path) == []


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(AfpqError, match="out"):
        with working(tmp_path / "out"):
            pytest.fail("must not start")
    assert (tmp_path / "out").read_text() == "x"


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with working(tmp_path / "out") as work:
        (work.path / "file").write_text("x")
    assert contents(tmp_path / "out") == ["file"]


def killed(out: Path, units: list[str]) -> Path:
    """What a run leaves that is killed after these units: nothing of it is cleaned up. Returns its directory."""
    work = WorkDirectory(out, {"recipe": "a"}, resume=True)
    for unit in units:
        (work.path / unit).write_text("x")
        work.finish(unit, [{"layer": unit}])
    os.close(work.lock._file)  # as the kernel does
    return work.path


def test_a_run_killed_before_its_first_unit_is_begun_again(tmp_path: Path) -> None:
    (killed(tmp_path / "out", []) / "stale").write_text("x")
    with working(tmp_path / "out", recipe="b") as work:
        assert work.finished == {}
        (work.path / "file").write_text("x")
    assert contents(tmp_path / "out") == ["file"]


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    killed(tmp_path / "out", ["one", "two"])
    with working(tmp_path / "out") as work:
        assert work.finished == {"one": [{"layer": "one"}], "two": [{"layer": "two"}]}
        (work.path / "three").write_text("x")
        work.finish("three", [])
    assert contents(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == ["one", "three", "two"]


def test_a_journal_cut_anywhere_tells_only_finished_units(tmp_path: Path) -> None:
    path = killed(tmp_path / "out", ["one", "two"])
    (journal,) = path.glob("*.jsonl")
    whole = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]  # of the head, of one, of two
    for length in range(len(whole) + 1):
        for tail in (b"", b"\0\0\0"):  # a crash of the machine may leave zeros
            path.mkdir(exist_ok=True)
            journal.write_bytes(whole[:length] + tail)
            work = WorkDirectory(tmp_path / "out", {"recipe": "a"}, resume=True)
            work.lock.release(path)
            assert list(work.finished) == ["one", "two"][: sum(length >= end for end in ends[1:])]


@pytest.mark.parametrize("place", ["file/out", "a" * 250, "a" * 300, "void"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "void").symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises(AfpqError, match=place[:60]):
        with working(tmp_path / place):
            pass
    assert contents(tmp_path) == ["file", "void"]


@pytest.mark.parametrize("place", ["", "."])
def test_the_working_directory_is_filled_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        with working(Path(place)) as work:
            (work.path / "file").write_text("x")
    except AfpqError:
        assert contents(tmp_path / "here") == []
    else:
        assert contents(tmp_path / "here") == ["file"]
    assert contents(tmp_path) == ["here"]


@pytest.mark.parametrize("target", ["an empty directory", "nothing"])
def test_a_link_stands_for_the_place_it_leads_to(tmp_path: Path, target: str) -> None:
    """A large disk is often linked to; a link could not be replaced by a directory after all the work."""
    (tmp_path / "disk").mkdir()
    place, out = tmp_path / "disk" / "out", tmp_path / "link"
    if target != "nothing":
        place.mkdir()
    out.symlink_to(place)
    with work_directory(out, 0, PRINT, True) as work:
        assert work.path == partial(place)
        (work.path / "config.json").write_text("{}")
    assert out.is_symlink() and [path.name for path in out.iterdir()] == ["config.json"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_links_that_lead_nowhere_useful_are_refused_before_any_work(tmp_path: Path) -> None:
    full, loop, file = tmp_path / "full", tmp_path / "loop", tmp_path / "file"
    full.mkdir()
    (full / "theirs").write_text("x")
    file.write_text("x")
    (tmp_path / "to full").symlink_to(full)
    (tmp_path / "to file").symlink_to(file)
    (tmp_path / "into a file").symlink_to(file / "out")
    loop.symlink_to(loop)
    (tmp_path / "to no disk").symlink_to(tmp_path / "not mounted" / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name in ("to full", "to file", "into a file", "loop", "to no disk"):
        with pytest.raises(AfpqError, match=name):
            with work_directory(tmp_path / name, 0, PRINT, True):
                pytest.fail("it works already")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (full / "theirs").exists() and not list(full.parent.glob("*.partial"))


def test_a_mounted_file_system_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(AfpqError, match="give a directory in it"):
        with work_directory(tmp_path / "out", 0, PRINT, True):
            pytest.fail("it works already")


def test_errors_name_out_and_not_the_temporary_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AfpqError) as error, work_directory(out, 0, PRINT, True) as work:
        with work.as_published({}) as directory:
            assert work.public(f"see {directory}", directory) == f"see {out}"
            raise AfpqError(f"{directory}/config.json: cannot be read")
    assert str(error.value) == f"{out}/config.json: cannot be read"


def test_a_failed_rename_names_where_it_leads(tmp_path: Path) -> None:
    with (
        pytest.raises(AfpqError, match=r"/there: cannot write: No space"),
        work_directory(tmp_path / "o", 0, PRINT, True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/source", None, "/there")
