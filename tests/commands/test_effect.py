# SPDX-License-Identifier: MIT
"""An option that was given and has no effect is an error that names it, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture
from command_line import text as text

from afpq.algorithms.methods import METHODS
from afpq.commands.effect import Use, idle_in_eval, idle_options

IDLE = {
    "samples": ["--samples", "4"],
    "windows": ["--seq-len", "32"],
    "seed, the default value": ["--seed", "0"],
    "seed": ["--seed", "3", "--text", "TEXT"],
    "samples with a text that is measured on": ["--samples", "4", "--text", "TEXT"],
    "experts": ["--all-experts"],
    "damp": ["--damp", "0.1"],
    "order": ["--order", "act"],
    "sweeps": ["--sweeps", "1"],
    "float target": ["--no-float-target"],
    "sequential": ["--sequential"],
    "damp of awq": ["--damp", "0.1", "--method", "awq", "--text", "TEXT"],
    "a text that nothing reads": ["--text", "TEXT", "--no-card-measure"],
    "a text beside one to measure on": ["--text", "TEXT", "--eval-text", "TEXT"],
    "measuring without a text": ["--card-measure"],
    "sensitivities": ["--sensitivities", "a.json"],
    "format with a budget": ["--format", "nf3", "--bits-per-weight", "3.5", "--text", "TEXT"],
    "a GPU": ["--device", "meta"],
}


@pytest.mark.parametrize("case", IDLE)
def test_refused_before_any_work(cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path, case: str) -> None:
    words = [str(text) if word == "TEXT" else word for word in IDLE[case]]
    result = cli("quantize", tiny_model_dir, tmp_path / "out", *words)
    if case == "a GPU":  # not on this machine: an error of its own
        assert result.code == 2
    else:
        assert_refused(result, f"{words[0]} has no effect here: ")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


FINE = {
    "a text is measured on": ["--text", "TEXT"],
    "in windows": ["--text", "TEXT", "--seq-len", "16"],
    "not measured": ["--no-card-measure"],
    "the device that it runs on": ["--device", "cpu"],
    "the method's options": [
        "--method",
        "gptq",
        "--text",
        "TEXT",
        "--damp",
        "0.1",
        "--samples",
        "2",
        "--seq-len",
        "16",
    ],
    "windows of an end pass": ["--end-pass", "1", "--text", "TEXT", "--samples", "2", "--seq-len", "16", "--seed", "1"],
    "the scheme of an end": ["--bits-per-weight", "3.5", "--format", "nf3", "--text", "TEXT", "--lm-head"],
}


@pytest.mark.parametrize("case", FINE)
def test_options_with_an_effect_pass(cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path, case: str) -> None:
    words = [str(text) if word == "TEXT" else word for word in FINE[case]]
    result = cli("quantize", tiny_model_dir, tmp_path / "out", *words, "--dry-run")
    assert result.code == 0, result


def test_the_error_names_the_method_and_those_that_have_the_option() -> None:
    assert idle_options(Use(method="rtn"))["damp"] == (
        "method rtn does not have it; it is for --method gptq, awq+gptq or tune"
    )
    assert "damp" not in idle_options(Use(method="gptq", text=True))


@pytest.mark.parametrize("method", METHODS)
def test_whatever_draws_windows_takes_their_options(method: str) -> None:
    for use in (Use(method=method, text=True, budget=True), Use(method=method, text=True, end_pass=True)):
        assert not idle_options(use).keys() & {"samples", "seed", "seq_len", "text"}


def test_experts_that_are_not_there(cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    result = cli("quantize", tiny_model_dir, tmp_path / "out", "--method", "gptq", "--text", text, "--all-experts")
    assert_refused(result, "--all-experts has no effect: LlamaForCausalLM has no experts")


def test_options_of_eval(cli: Cli, tiny_model_dir: Path, text: Path) -> None:
    assert_refused(cli("eval", tiny_model_dir, "--text", text, "--batch-size", "2"), "--batch-size", "--tasks")
    assert idle_in_eval(text=True, tasks=True) == {}
    assert "seq_len" in idle_in_eval(text=False, tasks=True)
