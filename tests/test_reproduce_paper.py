# SPDX-License-Identifier: MIT
"""examples/reproduce_paper.py: its numbers are the paper's, and a table can be made, stopped and gone on with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import afpq

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce_paper.py"
TEXT = "The quick brown fox jumps over the lazy dog; größer als nötig.\n" * 12


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_paper", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_paper"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_paper_s_tables_are_whole(script: ModuleType) -> None:
    models = ["LLaMA2-7B", "LLaMA2-13B", "LLaMA2-70B"]
    assert sorted(script.PAPER["tables"]) == ["1", "2", "3", "4", "7", "8"]
    for number, table in script.PAPER["tables"].items():
        for row in table["rows"].values():
            assert list(row) == (["LLaMA2-70B"] if number in "34" else models)
            for figures in row.values():
                assert set(figures) == {"perplexity", "mmlu"} and all(len(v) == 4 for v in figures.values())
                assert all(20 < value < 100 for value in figures["mmlu"])
                assert all(3 < value < 2000 for value in figures["perplexity"])


@pytest.mark.parametrize(
    ("table", "row", "group", "model", "measure", "value"),
    [
        ("1", "NF4-asym", 128, "LLaMA2-7B", "perplexity", 5.66),
        ("1", "INT4", -1, "LLaMA2-13B", "mmlu", 52.92),
        ("2", "NF3-asym", 128, "LLaMA2-7B", "perplexity", 6.29),
        ("2", "INT3", -1, "LLaMA2-7B", "perplexity", 542.80),
        ("2", "NF3-asym", 64, "LLaMA2-13B", "mmlu", 53.3),
        ("3", "NF3-asym", 128, "LLaMA2-70B", "perplexity", 3.66),
        ("4", "NF3-sym", 64, "LLaMA2-70B", "mmlu", 67.66),
        ("7", "FP4-sym", 256, "LLaMA2-70B", "perplexity", 3.47),
        ("8", "FP3-asym", -1, "LLaMA2-7B", "perplexity", 18.72),
        ("5", "NF3-asym", 64, "WizardCoder-7B", "humaneval", 52.43),
        ("5", "NF3-asym", 64, "WizardCoder-7B", "gsm8k", None),
        ("1", "NF4-asym", 32, "LLaMA2-7B", "perplexity", None),
        ("1", "NF4-asym", 128, None, "perplexity", None),
    ],
)
def test_known_numbers(
    script: ModuleType, table: str, row: str, group: int, model: str | None, measure: str, value: float | None
) -> None:
    cell = next(cell for cell in script.cells_of(table, [group], [row]) if cell.row == row)
    assert script.paper_number(table, cell, model, measure) == value
    assert script.paper_number("1", script.cells_of("1", [128], None)[0], "LLaMA2-70B", "perplexity") == 3.32


def test_rows_are_our_schemes(script: ModuleType) -> None:
    names = {str(afpq.parse_scheme(cell.scheme)) for t in "123478" for cell in script.cells_of(t, [-1, 64], None)[1:]}
    assert {"int4-asym-g64", "nf4-sym-g-1", "nf3-asym-g64", "fp4-sym-g64", "fp3-asym-g-1", "int3-asym-g-1"} <= names


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("meta-llama/Llama-2-7b-hf", "LLaMA2-7B"), ("/models/llama2_70B", "LLaMA2-70B"),
        ("WizardLM/WizardCoder-Python-7B-V1.0", "WizardCoder-7B"), ("meta-math/MetaMath-7B-V1.0", "MetaMath-7B"),
        ("meta-llama/Llama-2-7b-chat-hf", None), ("Qwen/Qwen3-0.6B", None), ("codellama/CodeLlama-7b", None),
    ],
)  # fmt: skip
def test_models_of_the_paper_are_known_by_name(script: ModuleType, name: str, model: str | None) -> None:
    assert script.paper_model(name) == model


def test_a_table_is_made_and_gone_on_with(
    script: ModuleType,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    out, text = tmp_path / "out", str(tmp_path / "text.txt")
    command = ["--table", "2", "--model", str(tiny_model_dir), "--out", str(out), "--text", text, "--seq-len", "64"]
    command += ["--groups=-1,64", "--rows", "NF3-sym,NF3-asym", "--kl", "--paper-model", "LLaMA2-7B"]
    made: list[str] = []
    quantize: Any = afpq.quantize

    def counted(model: str, place: Path, scheme: str, **options: Any) -> Any:
        made.append(scheme)
        if len(made) == 3:
            raise afpq.AfpqError("the power failed")
        return quantize(model, place, scheme, **options)

    monkeypatch.setattr(afpq, "quantize", counted)
    assert script.main(command) == 2
    assert "the power failed" in capsys.readouterr().err
    assert script.main(command) == 0
    assert made == ["nf3-sym-g-1", "nf3-sym-g64", "nf3-asym-g-1", "nf3-asym-g-1", "nf3-asym-g64"]
    lines = (out / "table-2.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| NF3")]) == 4
    row = next(line for line in lines if line.startswith("| NF3-asym | row |"))
    assert "| 9.85 |" in row and "3.4" in row
    cell = json.loads((out / "cells" / "rtn-nf3-asym-g64.json").read_text())
    assert cell["kl_divergence"] > 0 and cell["bits"] == pytest.approx(3.533, abs=1e-3)
    assert not list(out.rglob("*.safetensors"))
    assert script.main([*command, "--max-tokens", "128"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_latency_says_what_to_run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--table", "6"]) == 0
    out = capsys.readouterr().out
    assert "415.06" in out and "(1.62 x)" in out and "bench/linear.py" in out


def test_benchmarks_that_are_not_installed_are_told(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(afpq.AfpqError, match=r"mmlu could not be measured .*afpq\[eval\]"):
        script.run_task(str(tmp_path / "no-model"), "mmlu", tmp_path, 1)


def test_table_5_needs_its_models(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--table", "5", "--model", "some/model", "--out", str(tmp_path)]) == 2
    assert "--paper-model" in capsys.readouterr().err
