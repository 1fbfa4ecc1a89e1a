# SPDX-License-Identifier: MIT
"""One cell of a comparison: its figures are those of the library."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparisons import SETTINGS, TEXT, question, run_comparison

import afpq
from afpq.comparison import measure_cell as module
from afpq.comparison.cells import Cell
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows


def test_cells_hold_what_the_library_measures(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, methods=["rtn", "gptq"], schemes=["nf3-asym-g64"], calibration_text=TEXT[::-1])
    results, notes, agenda = run_comparison(asked, tmp_path / "report")
    assert [str(r.cell) for r in results] == ["float", "nf3-asym-g64 rtn", "nf3-asym-g64 gptq"]
    assert len(notes) == 3

    text = windows(tokenize(load_tokenizer(tiny_model_dir), TEXT), 32, 128)
    original = load_model(tiny_model_dir)
    afpq.quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64", method="gptq", text=TEXT[::-1], settings=SETTINGS)
    expected = evaluate(load_model(tmp_path / "out"), text, list(logits_of(original, text)))
    rtn, gptq = results[1:]
    assert rtn.calibration is None and gptq.calibration == "the calibration text, 4 windows of 32 tokens"
    assert gptq.evaluation.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    assert gptq.kl == pytest.approx(expected.kl_divergence, rel=1e-4)
    assert sum(gptq.window_divergences) / len(text) == pytest.approx(gptq.kl)
    assert results[0].evaluation.perplexity == pytest.approx(evaluate(original, text).perplexity)
    assert rtn.bits_per_weight == gptq.bits_per_weight == pytest.approx(3.5333, abs=1e-4)
    assert len(rtn.layers) == 14 and all(layer.output is None for layer in rtn.layers)
    assert all(layer.output is not None for layer in gptq.layers)
    assert len(rtn.codes) == 8 and sum(rtn.codes) == sum(t.elements for t in agenda.first.plan.targets)
    assert rtn.seconds and rtn.speed and rtn.tokens_per_second and results[0].speed == 1
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["cells"]


def test_logits_too_large_to_keep_are_computed_anew(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = question(tiny_model_dir, schemes=["nf3-asym-g64"])
    before, _, _ = run_comparison(asked, tmp_path / "a")
    monkeypatch.setattr(module, "KEPT_LOGITS", 0)
    again, _, _ = run_comparison(asked, tmp_path / "b")
    assert [r.kl for r in again] == pytest.approx([r.kl for r in before], rel=1e-5)


def test_a_real_peer_is_within_its_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results, _, _ = run_comparison(question(tiny_model_dir, schemes=["nf4-sym-g64"], peers=True), tmp_path)
    found = {r.cell: r for r in results}
    peer = found[Cell("nf4-b64", "bitsandbytes")]
    assert peer.bits_per_weight == pytest.approx(4.5) and 0 < peer.kl < 1
