# SPDX-License-Identifier: MIT
"""The arguments of `afpq.quantize`, old names among them, and what it returns."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest

from afpq import AfpqError, AwqOptions, CalibrationSettings, GptqOptions, Recipe, parse_scheme, quantize
from afpq.algorithms.solver_options import SolverOptions
from afpq.jobs.bit_budget import Budget
from afpq.jobs.prepare import Texts
from afpq.jobs.quantize_checkpoint import Request, run_request

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(2000))
SETTINGS = CalibrationSettings(samples=4, seq_len=32)


def test_every_field_of_a_recipe_can_be_given() -> None:
    assert {part.name for part in fields(Recipe)} <= inspect.signature(quantize).parameters.keys()


def test_an_unknown_argument_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"quantize\(\) got an unexpected keyword argument 'scale_serch'"):
        quantize("model", tmp_path / "out", scale_serch="mse")  # type: ignore[call-arg]


def test_the_outcome_has_the_plan_and_its_attributes_for_now(tiny_model_dir: Path, tmp_path: Path) -> None:
    outcome = quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64")
    assert outcome.measured.startswith("no text was given") and "self" not in outcome.tested  # type: ignore[union-attr]
    with pytest.warns(DeprecationWarning, match=r"read \.plan\.bits_per_weight"):
        assert outcome.bits_per_weight == outcome.plan.bits_per_weight
    with pytest.raises(AttributeError, match="magic"):
        _ = outcome.magic


def test_the_old_names_work_with_a_warning(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="evaluate="):
        outcome = quantize(tiny_model_dir, tmp_path / "a", "nf3-asym-g64", measured=False)
    assert "switched off" in str(outcome.measured)
    old = GptqOptions(sweeps=0, sequential=False)
    new: dict[str, SolverOptions] = {"gptq": old, "awq": AwqOptions(False)}
    for method, options in new.items():
        same = {"method": method, "text": TEXT, "settings": SETTINGS, "evaluate": False}
        with pytest.warns(DeprecationWarning, match="options="):
            quantize(tiny_model_dir, tmp_path / f"old {method}", gptq=old, **same)  # type: ignore[arg-type]
        quantize(tiny_model_dir, tmp_path / f"new {method}", options=options, **same)  # type: ignore[arg-type]
        made = [(tmp_path / f"{name} {method}" / "model.safetensors").read_bytes() for name in ("old", "new")]
        assert made[0] == made[1]


def test_a_dry_run_writes_nothing_but_sensitivities(tiny_model_dir: Path, tmp_path: Path) -> None:
    budget = Budget(4.0, (parse_scheme("nf3-asym-g64"), parse_scheme("nf4-asym-g64")))
    recipe = Recipe(parse_scheme("nf4-asym-g64"))
    texts = Texts(TEXT, evaluate=False)
    request = Request(
        model=tiny_model_dir, out=tmp_path / "out", recipe=recipe, texts=texts, settings=SETTINGS, budget=budget
    )
    job, outcome = run_request(request, dry_run=True)
    assert outcome is None and job.choice is not None
    kept = tmp_path / "out.sensitivities.json"
    assert list(tmp_path.iterdir()) == [kept] and json.loads(kept.read_text())
    job, outcome = run_request(request)
    assert outcome is not None and outcome.plan is job.plan
    assert not kept.exists() and list(tmp_path.iterdir()) == [tmp_path / "out"]
    with pytest.raises(AfpqError, match="exists already"):
        run_request(request, dry_run=True)
