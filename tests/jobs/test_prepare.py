# SPDX-License-Identifier: MIT
"""What a job needs, checked before any work; and what decides whether a stopped one may go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from afpq import AfpqError, AwqOptions, CalibrationSettings, GptqOptions, Recipe, parse_scheme
from afpq.jobs.bit_budget import Budget
from afpq.jobs.prepare import BudgetSearch, Texts, prepare, sensitivities_file

NF4 = parse_scheme("nf4-asym-g64")
TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(2000))
SETTINGS = CalibrationSettings(samples=4, seq_len=32)


@pytest.mark.parametrize(
    ("recipe", "budget", "words"),
    [
        (Recipe(NF4, "gptq"), None, "method gptq needs calibration text"),
        (Recipe(NF4), Budget(3.5, (NF4,)), "a budget of bits needs calibration text"),
        (Recipe(NF4, end_pass=3), None, "the end pass needs calibration text"),
    ],
)
def test_missing_text_is_an_error(tiny_model_dir: Path, recipe: Recipe, budget: Budget | None, words: str) -> None:
    with pytest.raises(AfpqError, match=words):
        prepare(tiny_model_dir, recipe, search=None if budget is None else BudgetSearch(budget))


def test_a_text_to_measure_on_without_measuring_is_an_error() -> None:
    with pytest.raises(AfpqError, match="choose one"):
        Texts(None, TEXT, evaluate=False)


def test_only_methods_that_need_it_get_windows(tiny_model_dir: Path) -> None:
    assert prepare(tiny_model_dir, Recipe(NF4), Texts(TEXT), settings=SETTINGS).windows is None
    windows = prepare(tiny_model_dir, Recipe(NF4, "awq"), Texts([TEXT, TEXT]), settings=SETTINGS).windows
    assert windows is not None and windows.shape == (4, 32)


def test_the_fingerprint_depends_on_what_decides_the_result(tiny_model_dir: Path) -> None:
    def setting(method: str, **options: object) -> str:
        recipe = Recipe(NF4, method, **options)  # type: ignore[arg-type]
        return str(prepare(tiny_model_dir, recipe, Texts(TEXT), settings=SETTINGS).fingerprint()["settings"])

    default = setting("gptq")
    assert setting("gptq", options=GptqOptions()) == default
    others = [setting("gptq", options=GptqOptions(sweeps=1)), setting("tune"), setting("gptq", skip=("q_proj",))]
    others += [setting("awq"), setting("awq", options=AwqOptions(False))]
    assert len({default, *others}) == 6


def test_sensitivities_survive_only_a_run_that_goes_on(tmp_path: Path) -> None:
    file = sensitivities_file(tmp_path / "out", None, resume=True)
    assert file == tmp_path / "out.sensitivities.json"
    file.write_text("{}")
    assert sensitivities_file(tmp_path / "out", None, resume=True).exists()
    assert not sensitivities_file(tmp_path / "out", None, resume=False).exists()
    assert sensitivities_file(tmp_path / "out", tmp_path / "mine", resume=False) == tmp_path / "mine"
