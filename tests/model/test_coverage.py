# SPDX-License-Identifier: MIT
"""A half-quantized model is told of wherever one meets it: while quantizing, on loading, and ever after."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from afpq import AfpqConfig, Recipe, parse_scheme, quantize
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import CARD
from afpq.model.coverage import LOW_COVERAGE, coverage_warning, kinds_left
from afpq.model.quantize_in_memory import quantize_model

GATE = "model.layers.*.mlp.gate_proj.weight (12,288)"  # of the tiny model: 2 x 96 x 64


def test_kinds_have_no_numbers_and_come_by_size() -> None:
    left = {"layers.0.a.weight": 2, "layers.10.a.weight": 3, "layers.1.conv1d.weight": 9, "h.1.experts.22.w1": 1}
    assert list(kinds_left(left).items()) == [
        ("layers.*.conv1d.weight", 9), ("layers.*.a.weight", 5), ("h.*.experts.*.w1", 1),
    ]  # fmt: skip


def test_a_warning_names_the_largest_and_counts_them_all() -> None:
    assert coverage_warning(LOW_COVERAGE, {"a": 5}) is None
    warning = coverage_warning(0.4, {f"layers.0.{'x' * n}": n for n in range(1, 10)})
    assert warning is not None and "only 40.0 %" in warning and "45 weights" in warning
    assert "layers.*.xxxxxxxxx (9)" in warning and warning.endswith("and 3 more")


def test_what_cannot_be_quantized_is_named_with_its_reason_however_small() -> None:
    reasons = {f"layers.{i}.router": "Router has a forward of its own" for i in range(3)}
    text = "layers.*.router (Router has a forward of its own)"
    assert coverage_warning(1.0, {}, reasons) == f"not quantized: {text}"
    warning = coverage_warning(0.5, {"layers.0.a": 5}, reasons)
    assert warning is not None and "50.0 %" in warning and warning.endswith(text)


def test_plan_info_and_card_name_what_is_left(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = quantize(tiny_model_dir, tmp_path / "out", skip=("mlp",)).plan
    assert sum(plan.left.values()) == 2 * 3 * 96 * 64 and len(plan.left) == 6
    info = model_info(tmp_path / "out")
    assert info.left == kinds_left(plan.left) and info.coverage == pytest.approx(plan.coverage)
    assert GATE in (tmp_path / "out" / CARD).read_text().replace("\\", "")


def test_a_whole_model_is_not_warned_of(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert quantize(tiny_model_dir, tmp_path / "out").plan.left == {}
    assert model_info(tmp_path / "out").left == {}
    assert "not quantized" not in (tmp_path / "out" / CARD).read_text()


def test_quantizing_on_load_warns(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(**keys: object) -> None:
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=AfpqConfig(**keys))  # type: ignore

    with caplog.at_level(logging.WARNING, "afpq"):
        load(bits=4)
        assert not caplog.records
        load(bits=4, modules_to_not_convert=[r".*mlp.*"])
    assert GATE in caplog.text and "40.0 %" in caplog.text


def test_quantizing_in_memory_warns(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with caplog.at_level(logging.WARNING, "afpq"):
        quantize_model(model, Recipe(parse_scheme("nf4-asym-g64"), skip=("gate_proj",)))
    assert GATE in caplog.text and "down_proj" not in caplog.text
