# SPDX-License-Identifier: MIT
"""The files of a comparison: page, Markdown and JSON, or one error."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import read_json
from comparisons import HALF, ORIGINAL, TWO

from afpq import AfpqError
from afpq.comparison.distributions import BINS, Asymmetry
from afpq.comparison.findings import sentences
from afpq.comparison.report import write_comparison
from afpq.comparison.rows import About

ABOUT = About("model", "a text", (6, 100), None, "a machine", 0.5)


def test_all_three_files_have_the_findings(tmp_path: Path) -> None:
    results = [ORIGINAL, TWO, HALF]
    written = write_comparison(tmp_path, ABOUT, results, [Asymmetry(64, (1,) * BINS, 0.25)])
    assert sorted(written) == sorted(tmp_path.iterdir())
    value = read_json(tmp_path / "report.json")
    assert value["title"] == "model: 2 ways to quantize it" and value["findings"] == sentences(results)
    assert [cell["cell"]["scheme"] for cell in value["cells"]] == ["float", "nf3-asym-g128", "nf3-sym-g64"]
    assert value["asymmetry"] == [{"group_size": 64, "counts": [1] * BINS, "lopsided": 0.25}]
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text("utf-8")
        assert all(sentence in text for sentence in [value["title"], *sentences(results)]), name


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="missing: cannot write the report"):
        write_comparison(tmp_path / "missing", ABOUT, [ORIGINAL, TWO], [])
