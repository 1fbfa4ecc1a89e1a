# SPDX-License-Identifier: MIT
"""When a run's figures call for calibration, and which command the advice names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Cli
from command_line import cli as cli  # the fixture
from small_models import plan_of

from afpq.algorithms.methods import METHODS
from afpq.evaluation.perplexity import Evaluation
from afpq.jobs.advice import BAD_KL, BETTER, advice, code_bits
from afpq.jobs.card_sample import CardFigures, CardText

# Rows of docs/LOG.md, lm6m: method, bits, perplexity, KL
CALLED_FOR = [
    ("rtn", 3, 52.77, 0.02771),
    ("rtn", 3, 53.74, 0.03697),
    ("rtn", 3, 54.58, 0.05365),
    ("awq", 3, 52.94, 0.02188),
]
GOOD = [
    ("rtn", 4, 52.02, 0.00575),
    ("rtn", 4, 52.42, 0.00951),
    ("gptq", 3, 52.12, 0.00990),
    ("gptq", 3, 52.37, 0.01513),
]


def figures(perplexity: float, kl: float, original: float = 51.754) -> CardFigures:
    result = Evaluation(perplexity, 1.0, 1000, kl, kl / 100, 0.9)
    return CardFigures(CardText(torch.zeros(2, 8, dtype=torch.long), "a text"), original, result)


@pytest.mark.parametrize(("method", "bits", "perplexity", "kl"), CALLED_FOR, ids=str)
def test_what_the_log_calls_bad_is_advised_on(
    tiny_model_dir: Path, method: str, bits: int, perplexity: float, kl: float
) -> None:
    line = advice(plan_of(tiny_model_dir, f"nf{bits}-asym-g64", method=method), figures(perplexity, kl))
    assert line is not None and f"{perplexity:.2f}" in line and "51.75" in line and "calibration is called for" in line
    assert ("--method gptq --text FILE" if method == "rtn" else f"--method {BETTER[-1]}") in line


@pytest.mark.parametrize(("method", "bits", "perplexity", "kl"), GOOD, ids=str)
def test_what_the_log_calls_good_is_not(
    tiny_model_dir: Path, method: str, bits: int, perplexity: float, kl: float
) -> None:
    assert advice(plan_of(tiny_model_dir, f"nf{bits}-asym-g64", method=method), figures(perplexity, kl)) is None


def test_smollm2_as_nf3_by_rounding(tiny_model_dir: Path) -> None:
    line = advice(plan_of(tiny_model_dir, "nf3-asym-g64"), figures(71.2, 0.9, 29.6))
    assert line is not None and "29.60 became 71.20" in line and line.endswith("--method gptq --text FILE")


@pytest.mark.parametrize("measured", [None, "no text was given"])
def test_few_bits_by_rounding_are_enough_if_nothing_was_measured(tiny_model_dir: Path, measured: str | None) -> None:
    for scheme, wanted in (("nf2-asym-g64", True), ("int3-sym-g32", True), ("nf4-asym-g64", False)):
        assert (advice(plan_of(tiny_model_dir, scheme), measured) is not None) == wanted
    assert advice(plan_of(tiny_model_dir, "nf2-asym-g64", method="gptq"), measured) is None


def test_a_model_that_cannot_be_calibrated_or_has_the_best_method_needs_bits(tiny_model_dir: Path) -> None:
    best = plan_of(tiny_model_dir, "nf2-asym-g64", method=BETTER[-1])
    for line in (
        advice(plan_of(tiny_model_dir, "nf2-asym-g64"), None, calibrates=False),
        advice(best, figures(60.0, 2 * BAD_KL)),
    ):
        assert line is not None and "more bits" in line and "--method" not in line


def test_the_methods_advised_are_ordered_and_known() -> None:
    assert BETTER[0] == "gptq" and all(METHODS[name].calibrated for name in BETTER)


def test_bits_of_codes_are_weighed(tiny_model_dir: Path) -> None:
    assert code_bits(plan_of(tiny_model_dir, "nf3-asym-g64")) == 3


def test_the_command_prints_it(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    for words in (["--dry-run"], []):
        assert "advice: " in cli("quantize", tiny_model_dir, tmp_path / "out", "--format", "nf3", *words).out
    assert "advice: " not in cli("quantize", tiny_model_dir, tmp_path / "four").out
