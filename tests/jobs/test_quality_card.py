# SPDX-License-Identifier: MIT
"""The quality card: a valid model card that tells what was done, the same each time, never the original's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load

import afpq
from afpq import AfpqError, Recipe, parse_scheme
from afpq.checkpoint.reader import CARD
from afpq.evaluation.perplexity import Evaluation
from afpq.jobs.card_sample import CardFigures, CardText
from afpq.jobs.prepare import prepare
from afpq.jobs.quality_card import PICTURE, Card, card_text

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = afpq.CalibrationSettings(samples=4, seq_len=48)


def note(block: int, kind: str, **more: Any) -> dict[str, Any]:
    module = f"model.layers.{block}.mlp.{kind}"
    return {"module": module, "method": "rtn", "weight_error": 0.01 * (block + 1), **more}


@pytest.fixture
def card(tiny_model_dir: Path) -> Card:
    plan = prepare(tiny_model_dir, Recipe(parse_scheme("nf3-asym-g64"))).plan
    notes = [note(0, "up_proj"), note(1, "up_proj"), note(1, "down_proj")]
    return Card(str(tiny_model_dir), plan, notes, None, "no text was given", "It works.")


def test_quantize_writes_it(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / CARD).write_text("---\nlicense: apache-2.0\n---\n# The original\n")
    afpq.quantize(tiny_copy, tmp_path / "out", "nf3-asym-g64", method="gptq", text=TEXT, settings=SETTINGS)
    text = (tmp_path / "out" / CARD).read_text("utf-8")
    assert "The original" not in text
    metadata: Any = metadata_load(tmp_path / "out" / CARD)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "transformers"
    assert {"afpq", "quantized", "3-bit", "nf3", "gptq"} == set(metadata["tags"])
    assert "base_model" not in metadata  # a directory's name is no id
    for words in (
        "# model, nf3-asym-g64 by gptq", "3.533 for a quantized weight", "100.0 % of the blocks' weights", "`lm_head`",
        "4 windows of 48 tokens", "that calibration did not use", "KL divergence", "import afpq", "afpq generate",
        "self-test", afpq.__version__,
    ):  # fmt: skip
        assert words.lower() in text.lower(), words
    assert str(tmp_path) not in text  # nothing of the machine it was made on


def test_two_runs_write_the_same_card(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        afpq.quantize(tiny_model_dir, tmp_path / name, "nf3-asym-g64", eval_text=TEXT)
    for name in (CARD, PICTURE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_model_from_the_hub_is_the_base_model(card: Card, tmp_path: Path) -> None:
    text = card_text(replace(card, model="some/model"), picture=False)
    (tmp_path / CARD).write_text(text)
    metadata: Any = metadata_load(tmp_path / CARD)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("some/model", "quantized")
    assert "https://huggingface.co/some/model" in text


def test_figures_and_their_errors(card: Card) -> None:
    sample = CardText(torch.zeros(16, 512, dtype=torch.int64), "b.txt")
    found = CardFigures(sample, 9.5, Evaluation(10.25, 0.5, 100, 0.0123, 0.0004, 0.951))
    text = card_text(replace(card, measured=found), picture=False)
    assert "| perplexity | 9.50 | 10.25 ± 0.50 |" in text
    assert "0.0123 ± 0.0004" in text and "95.1 %" in text and "Measured on b.txt: 16 windows of 512 tokens" in text
    one = replace(found, result=Evaluation(10.25, float("nan"), 100, 0.0123, float("nan"), 0.951))
    assert "nan" not in card_text(replace(card, measured=one), picture=False)


def test_errors_of_each_kind_of_layer(card: Card) -> None:
    text = card_text(card, picture=False)
    assert "| `up_proj` | 2 | 1.5e-02 | 2.0e-02 | `model.layers.1.mlp.up_proj` |" in text
    assert "squared error of a layer's weights" in text and PICTURE not in text
    calibrated = [note(0, "up_proj", output_error=0.5, output_error_before=0.7)]
    text = card_text(replace(card, notes=calibrated), picture=True)
    assert "on the calibration text" in text and "gradients" not in text
    tuned = [note(0, "up_proj", output_error=0.5, output_error_before=0.7, method="tune")]
    assert "as the gradients of the predictions say" in card_text(replace(card, notes=tuned), picture=True)


def test_layers_treated_otherwise_are_named(card: Card) -> None:
    odd = [note(i, "up_proj", note="not used; rounded to nearest") for i in range(20)]
    text = card_text(replace(card, notes=odd), picture=False)
    assert "`model.layers.0.mlp.up_proj` (not used; rounded to nearest)" in text and "8 more such layers" in text


def test_without_matplotlib_the_table_is_enough(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    afpq.quantize(tiny_model_dir, tmp_path / "out")
    assert not (tmp_path / "out" / PICTURE).exists()
    assert PICTURE not in (tmp_path / "out" / CARD).read_text()


def test_a_failing_card_leaves_nothing_finished(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AfpqError("no card")

    monkeypatch.setattr("afpq.jobs.finish_directory.write_card", fail)
    with pytest.raises(AfpqError, match="no card"):
        afpq.quantize(tiny_model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("config.json"))
