# SPDX-License-Identifier: MIT
"""Reports: every figure in the table, in the JSON and, where matplotlib is installed, in the picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from afpq import AfpqError
from afpq.demo.demo_report import HEADER, Row, cells, markdown_table, plot_symmetric_against_asymmetric, write_report
from afpq.evaluation.perplexity import Evaluation

ROWS = [
    Row("float16", 16.0, 5.2, Evaluation(12.3456, 0.1234, 1000)),
    Row("nf3-sym-g128", 3.125, 1.1, Evaluation(15.5, 0.25, 1000, 0.1234, 0.0042, 0.8125)),
    Row("nf3-asym-g128", 3.25, 1.2, Evaluation(14.25, 0.24, 1000, 0.0986, 0.0031, 0.84)),
    Row("int4-sym-g128", 4.125, 1.5, Evaluation(12.8, 0.12, 1000, 0.0211, 0.001, 0.95)),
]


def test_cells_round_the_figures() -> None:
    assert cells(ROWS[1]) == ("nf3-sym-g128", "3.125", "1.10", "15.50 ±0.25", "123.4 ±4.2", "81.2")
    assert len(cells(ROWS[0])) == len(HEADER)
    assert cells(ROWS[0])[4:] == ("", "")  # no reference, no distance from it


def test_the_table_is_markdown() -> None:
    assert markdown_table(ROWS[:2]) == (
        "| scheme | bits/weight | size MB | perplexity | KL x 1000 | top-1 % |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| float16 | 16.000 | 5.20 | 12.35 ±0.12 |  |  |\n"
        "| nf3-sym-g128 | 3.125 | 1.10 | 15.50 ±0.25 | 123.4 ±4.2 | 81.2 |\n"
    )


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = write_report(tmp_path / "new" / "report", "A title", "Some text.", ROWS)
    assert sorted(path.name for path in written) == ["report.json", "report.md", "report.png"]
    assert all(path.is_file() for path in written)
    text = (tmp_path / "new" / "report" / "report.md").read_text("utf-8")
    assert text.startswith("# A title\n") and "Some text." in text and markdown_table(ROWS) in text
    assert "(report.png)" in text
    value = json.loads((tmp_path / "new" / "report" / "report.json").read_text("utf-8"))
    assert [row["scheme"] for row in value["rows"]] == [row.scheme for row in ROWS]
    assert value["rows"][1] == ROWS[1].to_json()
    assert (tmp_path / "new" / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written = write_report(tmp_path, "A title", "Some text.", ROWS)
    assert sorted(path.name for path in written) == ["report.json", "report.md"]
    assert "png" not in (tmp_path / "report.md").read_text("utf-8")


def test_a_report_may_be_written_again(tmp_path: Path) -> None:
    write_report(tmp_path, "First", "", ROWS)
    write_report(tmp_path, "Second", "", ROWS[:1])
    assert (tmp_path / "report.md").read_text("utf-8").startswith("# Second\n")


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[1:2]], ids=["none", "only float", "only symmetric"])
def test_a_picture_of_few_rows(tmp_path: Path, rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    assert plot_symmetric_against_asymmetric(rows, "A title", tmp_path / "a.png") == tmp_path / "a.png"
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/deep"):
        with pytest.raises(AfpqError, match="file"):
            write_report(tmp_path / place, "A title", "", ROWS)
