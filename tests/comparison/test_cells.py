# SPDX-License-Identifier: MIT
"""Files of finished cells: the same figures back, names any file system takes, nothing torn taken for whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq import AfpqError
from afpq.comparison.cells import FLOAT, Cell, LayerError, Result, changes, load, load_all, place_of, save
from afpq.evaluation.perplexity import Evaluation

RESULT = Result(
    Cell("nf3-asym-g128", "gptq"), 3.25, 0.99, 12345, Evaluation(52.3, 1.2, 1000, 0.01, 0.0002, 0.92),
    (3.9, 4.0), (0.009, 0.011), 12.5, 0.8, 33.0,
    (LayerError("model.layers.0.mlp.up_proj", 0.04, 0.03, 0.01), LayerError("q", 0.05)), (1, 2, 3, 4, 5, 6, 7, 8),
)  # fmt: skip


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path, RESULT, {"model": "a"})
    place = place_of(tmp_path, RESULT.cell, {"model": "a"})
    assert [*tmp_path.iterdir()] == [place] and place.name.startswith("nf3-asym-g128_gptq-")
    assert load(place) == (RESULT, {"model": "a"})


def test_the_same_cell_with_other_settings_lies_beside_it(tmp_path: Path) -> None:
    save(tmp_path, RESULT, {"text": "a"})
    save(tmp_path, replace(RESULT, seconds=1.0), {"text": "b"})
    assert {each.fingerprint["text"]: each.result.seconds for each in load_all(tmp_path)} == {"a": 12.5, "b": 1.0}
    (tmp_path / "torn.json").write_text("{")
    assert len(load_all(tmp_path)) == 2


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its name has no digest, and it has no words for its text."""
    value = RESULT.to_json()
    del value["text"]
    (tmp_path / "nf3-asym-g128_gptq.json").write_text(json.dumps({"fingerprint": {"model": "a"}, "result": value}))
    assert [each.result for each in load_all(tmp_path)] == [RESULT]


def test_one_window_has_no_standard_error_and_is_still_json(tmp_path: Path) -> None:
    single = Result(FLOAT, 16.0, 0.0, 1, Evaluation(5.0, math.nan, 3, 0.1, math.nan, 1.0), (1.6,), ())
    save(tmp_path, single, {})
    place = place_of(tmp_path, FLOAT, {})
    assert "NaN" not in place.read_text()
    found = load(place)
    assert found is not None and math.isnan(found[0].evaluation.standard_error)
    assert found[0].evaluation.kl_standard_error is not None and math.isnan(found[0].evaluation.kl_standard_error)


@given(st.text(min_size=1, max_size=300), st.text(max_size=20))
def test_any_name_makes_a_file_name(scheme: str, method: str) -> None:
    name = Cell(scheme, method).file_name
    assert 0 < len(name) < 100 and not set(name) & set('/\\:*?"<>| ') and name.isascii()


def test_file_names_differ_where_cells_do() -> None:
    long = "lut:" + ":".join(str(i) for i in range(-50, 50))
    cells = [
        Cell(s, m) for s in ("nf4-asym-g128", f"{long}-sym-g64", f"{long}-sym-g32", "a b", "a:b") for m in ("", "x")
    ]
    assert len({cell.file_name for cell in cells}) == len(cells)
    assert Cell("nf4-asym-g128", "rtn").file_name == "nf4-asym-g128_rtn"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"fingerprint": {}, "result": {"cell": {}}}', "\xff"])
def test_what_is_no_result_counts_as_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, "latin-1")
    assert load(tmp_path / "a.json") is None
    assert load(tmp_path / "missing.json") is None


def test_a_torn_file_counts_as_nothing(tmp_path: Path) -> None:
    save(tmp_path, RESULT, {})
    path = place_of(tmp_path, RESULT.cell, {})
    path.write_bytes(path.read_bytes()[:-20])
    assert load(path) is None


def test_a_newer_field_counts_as_another_file(tmp_path: Path) -> None:
    value = {"fingerprint": {}, "result": {**RESULT.to_json(), "unknown": 1}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert load(tmp_path / "a.json") is None


def test_changes_are_named() -> None:
    assert changes({"model": "a", "text": "b"}, {"model": "a", "text": "b"}) == []
    assert changes({"model": "a", "text": "b"}, {"model": "x", "text": "b", "setting": "c"}) == ["model", "setting"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="cannot write"):
        save(tmp_path / "nowhere", RESULT, {})
