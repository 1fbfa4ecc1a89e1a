# SPDX-License-Identifier: MIT
"""A run begun with other settings: what differs is named, with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import TEXT
from hypothesis import given
from hypothesis import strategies as st

from afpq import AfpqError, CalibrationSettings, Format, Recipe, parse_scheme, quantize
from afpq.checkpoint.fingerprint import SETTINGS, code_books, differences, recipe_settings
from afpq.numerics.scheme import Scheme

NF4 = parse_scheme("nf4-asym-g64")


def test_settings_by_name_and_digests_by_key() -> None:
    old = {"model": "a", "text": "b", SETTINGS: {"method": "gptq", "seed": 0, "list of skips": ["x"], "damp": 0.1}}
    assert differences(old, old) == []
    assert differences(old, {**old, "model": "c", "text": "d"}) == ["model", "text"]
    changed = {"method": "rtn", "seed": 0, "list of skips": [], "damp": 0.1}
    assert differences(old, {**old, SETTINGS: changed}) == ["method (gptq, now rtn)", "list of skips (x, now none)"]
    fewer = {key: value for key, value in old[SETTINGS].items() if key != "damp"}  # type: ignore[attr-defined]
    assert differences(old, {**old, SETTINGS: fewer}) == ["damp (0.1, now none)"]


def test_a_text_is_not_blamed_for_windows_that_were_drawn_otherwise() -> None:
    old = {"text": "b", SETTINGS: {"seed": 0}}
    assert differences(old, {"text": "c", SETTINGS: {"seed": 1}}) == ["seed (0, now 1)"]


@pytest.mark.parametrize("old", [None, {}, [], {SETTINGS: "a digest of before"}], ids=str)
def test_a_journal_of_another_form_differs(old: Any) -> None:
    assert differences(old, {SETTINGS: {"seed": 0}}) == ["set of settings"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c, max_size=3), max_leaves=4
)


@given(st.dictionaries(st.text(min_size=1), JSON), st.dictionaries(st.text(min_size=1), JSON))
def test_nothing_differs_exactly_if_all_is_equal(old: dict[str, Any], new: dict[str, Any]) -> None:
    found = differences({SETTINGS: old}, {SETTINGS: new})
    assert (found == []) == (all(old.get(k) == new.get(k) for k in {*old, *new}))
    assert all(len(each) < 300 + max(map(len, [*old, *new])) for each in found)


def test_a_recipe_s_settings_are_data_that_json_keeps() -> None:
    recipe = Recipe(NF4, "gptq", skip=("a",), overrides=(("b", NF4),), lm_head=NF4)
    settings = recipe_settings(recipe)
    assert json.loads(json.dumps(settings)) == settings
    assert settings["list of overrides"] == ["b=nf4-asym-g64"] and settings["damp"] == 0.01


def test_code_books_count_by_their_values() -> None:
    a, b = (Recipe(Scheme(Format("mine", values), 64)) for values in ((-1.0, 0.0, 1.0), (-1.0, 0.0, 0.5)))
    assert str(a.scheme) == str(b.scheme) and code_books(a) != code_books(b)


def test_a_run_that_goes_on_with_other_settings_names_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(name: str, _done: int, _all: int) -> None:
        if "model.layers.1" in name:
            raise Stop

    options: dict[str, Any] = {"text": TEXT, "evaluate": False, "method": "gptq"}
    few = CalibrationSettings(samples=4, seq_len=32)
    with pytest.raises(Stop):
        quantize(tiny_model_dir, tmp_path / "out", settings=few, progress=stop, **options)
    for changes, words in (
        ({"settings": CalibrationSettings(samples=5, seq_len=32)}, "another number of samples (4, now 5);"),
        ({"skip": ("q_proj",), "settings": few}, "another list of skips (none, now q_proj);"),
        ({"method": "tune", "settings": few}, "another method (gptq, now tune);"),
        ({"text": TEXT[::-1], "settings": few}, "another text;"),
    ):
        with pytest.raises(AfpqError) as error:
            quantize(tiny_model_dir, tmp_path / "out", **{**options, **changes})
        assert words in str(error.value)
