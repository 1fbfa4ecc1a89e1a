# SPDX-License-Identifier: MIT
"""What goes to which stream: results, notes, progress and JSON, under `--quiet`, `--verbose` and `--json -`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Cli, assert_refused, finish, start
from command_line import cli as cli  # the fixtures
from command_line import packed as packed
from command_line import text as text

from afpq.commands import output
from afpq.commands.output import check_json_place, choose_output, duration_text, progress_bar, reset_output, save_json
from afpq.errors import AfpqError


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    reset_output()


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


# ---- progress


def test_short_work_prints_nothing_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("start") as advance:
        advance("layers", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_long_work_prints_lines_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "SECONDS_BETWEEN", 0.02)
    with progress_bar("loading") as advance:
        time.sleep(0.1)
        advance("block 1", 10, 100)
        time.sleep(0.05)
        advance("block 2", 20, 100)
        time.sleep(0.1)
    out, err = capsys.readouterr()
    lines = err.split("\n")
    assert out == "" and "\r" not in err and "\x1b" not in err and lines.pop() == ""
    assert lines[0] == "loading: 1 s"
    assert re.fullmatch(r"block 2: 1 s, 20 %, about 1 s left", lines[-1])
    time.sleep(0.05)
    assert capsys.readouterr() == ("", "")  # it has ended


def test_verbose_prints_a_line_for_each_unit_and_quiet_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "SECONDS_BETWEEN", 0.01)
    reports = [("a", 1, 4), ("a", 1, 4), ("b", 4, 4)]
    choose_output(verbose=True, quiet=False)
    monkeypatch.setattr(output, "SECONDS_BETWEEN", 60)
    with progress_bar("start") as advance:
        for report in reports:
            advance(*report)
    assert capsys.readouterr() == ("", " 25 % a\n100 % b\n")
    reset_output()
    choose_output(verbose=False, quiet=True)
    monkeypatch.setattr(output, "SECONDS_BETWEEN", 0.01)
    with progress_bar("start") as advance:
        time.sleep(0.05)
        advance(*reports[0])
    output.warn("of something")
    assert capsys.readouterr() == ("", "")


def test_a_redirected_run_prints_where_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As a process: standard error is a pipe, and what Transformers prints does not come between."""
    code = (
        "import afpq.commands.output as o, afpq.jobs.quantize_checkpoint as q, time; o.SECONDS_BETWEEN = 0.2\n"
        "run = q.run_request\n"
        "def slow(*a):\n    time.sleep(1)\n    return run(*a)\n"
        "q.run_request = slow\nfrom afpq.cli import main; main()"
    )
    import subprocess
    import sys

    words = ["quantize", str(tiny_model_dir), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) >= 3 and all(re.fullmatch(r"[^:]+: \d+ s(, \d+ %.*)?", line) for line in lines), lines


# ---- commands


def test_quiet_leaves_the_line_with_the_path(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "out"
    quiet = cli("quantize", tiny_model_dir, place, "--skip", "mlp", "--quiet")
    assert (quiet.code, quiet.err) == (0, "") and re.fullmatch(rf"wrote {place}: [^\n]+\n", quiet.out)
    assert_refused(cli("--quiet", "quantize", tiny_model_dir, place), "exists already")
    again = cli("quantize", tiny_model_dir, tmp_path / "again", "--skip", "mlp")  # the choice ends with the command
    assert "self-test" in again.out and "warning" in again.err


def test_verbose_prints_the_units(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = cli("quantize", tiny_model_dir, tmp_path / "out", "--verbose")
    assert result.code == 0
    lines = result.err.splitlines()
    assert [re.sub(r" error .*", "", line) for line in lines[1:]] == [" 67 % model.layers.0", "100 % model.layers.1"]
    assert lines[0].endswith("% outside the blocks")


def test_json_on_standard_output_is_alone_there(
    cli: Cli, tiny_model_dir: Path, packed: Path, text: Path, tmp_path: Path
) -> None:
    for words in (
        ["quantize", tiny_model_dir, tmp_path / "out"],
        ["info", packed],
        ["eval", packed, "--text", text, "--seq-len", "64"],
        ["inspect", tiny_model_dir, "--bits", "4", "--group-size", "32"],
        ["export", packed, tmp_path / "plain"],
    ):
        result = cli(*words, "--json", "-")
        assert result.code == 0 and isinstance(json.loads(result.out), dict), words
        assert result.err, "the text is there, beside it"
    assert "self-test" in cli("quantize", tiny_model_dir, tmp_path / "text").out
    assert not (tmp_path / "-").exists() and not Path("-").exists()
    silent = cli("info", packed, "--json", "-", "--quiet")
    assert silent.err == "" and json.loads(silent.out)


def test_a_mistake_with_json_on_standard_output(cli: Cli) -> None:
    assert_refused(cli("info", "/no/such/dir", "--json", "-"), "/no/such/dir")


def test_json_into_a_pipe(packed: Path) -> None:
    done = finish(start("info", packed, "--json", "-"))
    assert done.code == 0 and json.loads(done.out)["quantization_config"]["quant_method"] == "afpq"


# ---- threads


def test_threads_are_torchs(cli: Cli, packed: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), []
    try:
        assert cli("generate", packed, "a", "--max-new-tokens", "1", "--threads", str(before + 1)).code == 0
        found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [before + 1]


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "compare", "inspect"])
@pytest.mark.parametrize("count", ["0", "-3", "99999999999"])
def test_threads_out_of_range(cli: Cli, tmp_path: Path, command: str, count: str) -> None:
    words = {
        "quantize": ["a", tmp_path / "b"],
        "eval": ["a"],
        "generate": ["a", "b"],
        "inspect": ["a"],
        "compare": ["a", "--schemes", "nf4-sym-g64", "--report", tmp_path / "report"],
    }[command]
    assert_refused(cli(command, *words, "--threads", count), "--threads", count)
    assert list(tmp_path.iterdir()) == []
