# SPDX-License-Identifier: MIT
"""The finished directory: settled schemes, config, and which layers a calibrated method left to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import afpq
from afpq import Recipe, parse_scheme
from afpq.jobs.finish_directory import LOG_NAME, settled
from afpq.jobs.prepare import prepare

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(2000))
SETTINGS = afpq.CalibrationSettings(samples=4, seq_len=32)


def test_targets_get_their_learned_codebooks(tiny_model_dir: Path) -> None:
    plan = prepare(tiny_model_dir, Recipe(parse_scheme("learned2-sym-g64"))).plan
    text = "lut:-1.0:-0.25:0.25:1.0-sym-g64"
    schemes = {target.module: text for target in plan.targets}
    assert {target.scheme for target in settled(plan, schemes).targets} == {parse_scheme(text)}
    del schemes[plan.targets[0].module]
    with pytest.raises(KeyError):
        settled(plan, schemes)


def test_a_plan_without_learned_codebooks_stays(tiny_model_dir: Path) -> None:
    plan = prepare(tiny_model_dir, Recipe(parse_scheme("nf3-sym-g64"))).plan
    assert settled(plan, {}) is plan


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounded_layers_are_those_a_calibrated_method_could_not_do(
    tiny_model_dir: Path, tmp_path: Path, method: str
) -> None:
    outcome = afpq.quantize(
        tiny_model_dir, tmp_path / "out", "nf4-asym-g64", method=method, text=TEXT, settings=SETTINGS,
        embedding="int8-sym-g64", evaluate=False,
    )  # fmt: skip
    assert outcome.rounded == (() if method == "rtn" else ("model.embed_tokens",))
    assert (tmp_path / "out" / LOG_NAME).read_text().count("\n") == len(outcome.plan.targets)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ("calibration" in keys) == (method == "gptq") and keys["made_by"].startswith("afpq ")
