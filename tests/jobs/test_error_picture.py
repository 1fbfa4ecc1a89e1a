# SPDX-License-Identifier: MIT
"""The picture of the layers' errors: what it is drawn of, and when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from afpq.jobs.error_picture import block_of, error_of, kind_of, plot_errors

NOTES = [
    {"module": f"model.layers.{block}.mlp.{kind}", "weight_error": 0.01 * (block + 1)}
    for block in range(3)
    for kind in ("up_proj", "down_proj")
]


def test_names_of_layers_are_read() -> None:
    assert kind_of("model.layers.3.mlp.up_proj") == "up_proj" and kind_of("lm_head") == "lm_head"
    assert block_of("model.layers.3.mlp.experts.7.w1") == 3 and block_of("lm_head") is None


def test_the_error_of_outputs_goes_before_that_of_weights() -> None:
    assert error_of({"weight_error": 0.5}) == 0.5
    assert error_of({"weight_error": 0.5, "output_error": 0.25}) == 0.25


def test_a_picture_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_errors(NOTES, tmp_path / "a.png") and plot_errors(NOTES, tmp_path / "b.png")
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture == (tmp_path / "b.png").read_bytes()


def test_without_layers_or_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not plot_errors([], tmp_path / "none.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert not plot_errors(NOTES, tmp_path / "none.png") and not (tmp_path / "none.png").exists()
