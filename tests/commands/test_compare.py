# SPDX-License-Identifier: MIT
"""`afpq compare` from the command line: a report from one command, and one clear line for what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command_line import Cli, assert_refused, read_json
from command_line import cli as cli  # the fixture

TEXT = "The quick brown fox jumps over the lazy dog; größer als nötig.\n" * 6
SMALL = ("--seq-len", "32", "--max-tokens", "128", "--samples", "4")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return tmp_path / "text.txt"


def test_a_comparison_and_one_more_method(cli: Cli, tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    report = tmp_path / "new" / "report"
    schemes = ("--schemes", "nf3-asym-g64,nf3-sym-g32")
    common = ("compare", tiny_model_dir, *schemes, "--text", text, *SMALL, "--report", report)
    first = cli(*common)
    assert (first.code, first.err) == (0, ""), first.err
    assert "[2/3] nf3-asym-g64 rtn: 3.533 bits" in first.out and f"wrote {report}/report.html" in first.out
    assert "nf3-asym-g64 rtn against nf3-sym-g32 rtn" in first.out
    second = cli(*common, "--methods", "gptq", "--calibration-text", text)
    assert second.code == 0 and "warning: calibrated on the very text" in second.err
    assert "float: kept from an earlier run" in second.out
    value = read_json(report / "report.json")
    assert value["cells"][0]["cell"]["scheme"] == "float"
    assert {c["cell"]["method"] for c in value["cells"]} == {"", "rtn", "gptq"} and len(value["cells"]) == 5
    assert {"findings", "measured", "asymmetry"} <= set(value)
    assert "text.txt, 4 windows of 32 tokens" in (report / "report.md").read_text("utf-8")


BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown scheme": (["--schemes", "nf4"], ["nf4", "nf4-asym-g128"]),
    "unknown format": (["--schemes", "nf4-sym-g64,nf9-sym-g64"], ["nf9", "known"]),
    "no scheme": (["--schemes", ","], ["--schemes"]),
    "unknown method": (["--methods", "rtn,magic"], ["magic", "gptq"]),
    "no method": (["--methods", ""], ["--methods"]),
    "no calibration text": (["--methods", "gptq"], ["gptq", "--calibration-text"]),
    "calibration text that is missing": (["--methods", "gptq", "--calibration-text", "/no/such.txt"], ["/no/such.txt"]),
    "a text shorter than a window": (["--max-tokens", "20"], ["20 tokens", "window of 32"]),
    "no text": (["--text", "EMPTY"], ["empty.txt", "no text"]),
    "two texts": (["--dataset", "ptb"], ["--text"]),
    "no samples": (["--samples", "0"], ["sample"]),
    "unknown device": (["--device", "abacus"], ["abacus"]),
    "unknown option": (["--frobnicate"], ["--frobnicate"]),
    "a report that is a file": (["--report", "TEXT"], ["text.txt", "cannot write"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_of_compare(cli: Cli, tiny_model_dir: Path, text: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    options, words = BAD[case]
    given = [str(text) if o == "TEXT" else str(tmp_path / "empty.txt") if o == "EMPTY" else o for o in options]
    plain = ["--schemes", "nf3-sym-g64", "--text", str(text), *SMALL, "--report", str(tmp_path / "report")]
    assert_refused(cli("compare", tiny_model_dir, *plain, *given), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "text.txt"]


def test_a_missing_extra_is_one_line(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    options = ("--schemes", "nf3-sym-g64", "--dataset", "ptb", "--report", tmp_path / "report")
    assert_refused(cli("compare", tiny_model_dir, *options), "pip install 'afpq[eval]'")
    monkeypatch.setattr("afpq.comparison.peers.PEERS", ())
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    options = ("--schemes", "nf3-sym-g64", "--text", tmp_path / "text.txt", "--peers", "--report", tmp_path / "report")
    assert_refused(cli("compare", tiny_model_dir, *options), "--peers", "pip install")
    assert not (tmp_path / "report").exists()
