# SPDX-License-Identifier: MIT
"""What is printed: durations, places for JSON, and a bar that is silent off a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from afpq.commands.console import check_json_place, duration_text, print_estimate, progress_bar, save_json
from afpq.errors import AfpqError
from afpq.jobs.estimate import Estimate


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.1, "1 s"), (89, "89 s"), (120, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_place_for_json_is_checked_before_any_work(tmp_path: Path) -> None:
    check_json_place(None)
    check_json_place(tmp_path / "a.json")
    for place in (tmp_path, tmp_path / "none" / "a.json"):
        with pytest.raises(AfpqError, match="cannot write the JSON there"):
            check_json_place(place)
    save_json(tmp_path / "a.json", {"a": 1})
    assert '"a": 1' in (tmp_path / "a.json").read_text()
    with pytest.raises(AfpqError, match="cannot write"):
        save_json(tmp_path / "none" / "a.json", {})


def test_an_estimate_names_scratch_files_only_if_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    print_estimate(Estimate(10**9, 0, 5))
    print_estimate(Estimate(10**9, 10**6, 5))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("of memory, 5 s") and "of scratch files, 5 s" in second


def test_the_bar_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("start") as advance:
        advance("layers", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
