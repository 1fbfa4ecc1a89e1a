# SPDX-License-Identifier: MIT
"""A comparison: figures as the library's own, finished cells kept, changes noticed, nothing lost by a stop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import afpq
from afpq import AfpqError, CalibrationSettings
from afpq.comparison import run as module
from afpq.comparison.cells import FLOAT, Cell, Result
from afpq.comparison.peers import Peer
from afpq.comparison.report import write_comparison
from afpq.comparison.run import Comparison, asymmetries, describe_setting
from afpq.comparison.tasks import Agenda, Question, make_agenda
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows

TEXT = "The quick brown fox jumps over the lazy dog; größer als nötig.\n" * 6
SETTINGS = CalibrationSettings(4, 32, device="cpu")


def question(model: Path, **changes: Any) -> Question:
    plain = Question(str(model), ["nf3-asym-g64", "nf3-sym-g32"], ["rtn"], TEXT, None, SETTINGS, 32, 128)
    return replace(plain, **changes)


def run(asked: Question, directory: Path) -> tuple[list[Result], list[str], Agenda]:
    notes: list[str] = []
    agenda = make_agenda(asked)
    results = Comparison(asked, agenda, directory).run(lambda *_: None, notes.append)
    return results, notes, agenda


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three cells; tests that change it copy nothing, since they only add."""
    directory = tmp_path_factory.mktemp("finished")
    run(question(tiny_model_dir), directory)
    return directory


def test_cells_hold_what_the_library_measures(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, methods=["rtn", "gptq"], schemes=["nf3-asym-g64"], calibration_text=TEXT[::-1])
    results, notes, agenda = run(asked, tmp_path / "report")
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
    tiny_model_dir: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_LOGITS", 0)
    again, _, _ = run(question(tiny_model_dir), tmp_path)
    before, _, _ = run(question(tiny_model_dir), finished)
    assert [r.kl for r in again] == pytest.approx([r.kl for r in before], rel=1e-5)


def test_finished_cells_are_kept_without_loading_a_model(
    tiny_model_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    results, notes, _ = run(question(tiny_model_dir), finished)
    assert len(results) == 3 and all("kept" in note for note in notes)


def test_other_schemes_add_to_what_is_there(tiny_model_dir: Path, finished: Path) -> None:
    results, notes, agenda = run(question(tiny_model_dir, schemes=["int3-asym-g64"]), finished)
    assert {str(r.cell) for r in results} == {
        "float", "int3-asym-g64 rtn", "nf3-asym-g64 rtn", "nf3-sym-g32 rtn"
    }  # fmt: skip
    assert results[0].cell == FLOAT and notes[0] == "float: kept from an earlier run"
    assert [group.group_size for group in asymmetries(agenda, results)] == [32, 64]


CHANGES: dict[str, tuple[Callable[[Question], Question], str]] = {
    "text": (lambda q: replace(q, text=TEXT.upper()), "text"),
    "fewer tokens": (lambda q: replace(q, max_tokens=64), "text"),
    "shorter windows": (lambda q: replace(q, seq_len=16), "text"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_text_is_measured_again(tiny_model_dir: Path, tmp_path: Path, case: str) -> None:
    change, word = CHANGES[case]
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"])
    run(question(tiny_model_dir, schemes=["nf3-asym-g64"]), tmp_path)
    first, _, _ = run(asked, tmp_path)
    second, notes, _ = run(change(asked), tmp_path)
    assert f"nf3-sym-g64 rtn: was measured with another {word}; measured again" in notes
    assert f"nf3-asym-g64 rtn: of an earlier run with another {word}; left out" in notes
    assert [str(r.cell) for r in second] == ["float", "nf3-sym-g64 rtn"]
    assert second[1].evaluation != first[1].evaluation


def test_another_model_is_measured_again(tiny_copy: Path, tmp_path: Path) -> None:
    asked = question(tiny_copy, schemes=["nf3-sym-g64"])
    run(asked, tmp_path / "report")
    weights = tiny_copy / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    _, notes, _ = run(asked, tmp_path / "report")
    assert sum("another model; measured again" in note for note in notes) == 2


def test_other_calibration_is_measured_again_but_rtn_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"], methods=["rtn", "gptq"], calibration_text=TEXT.upper())
    run(asked, tmp_path)
    _, notes, _ = run(replace(asked, settings=replace(SETTINGS, seed=1)), tmp_path)
    assert [("again" in note, "kept" in note) for note in notes[:3]] == [(False, True), (False, True), (True, False)]
    assert "calibration text" in notes[2]


def test_a_stop_loses_no_finished_cell(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while the second scheme is measured: the first is kept, and the second's model is not made again."""
    real, calls = module.measure, []

    def stop(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(question(tiny_model_dir), tmp_path)
    monkeypatch.setattr(module, "measure", real)
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == ["float.json", "nf3-asym-g64_rtn.json"]
    monkeypatch.setattr(module, "execute", lambda *_, **__: pytest.fail("quantized again"))
    results, notes, _ = run(question(tiny_model_dir), tmp_path)
    assert [("kept" in note) for note in notes] == [True, True, False]
    assert results[2].seconds is None and results[1].seconds is not None
    assert not (tmp_path / "work").exists()


def test_quantized_models_are_kept_on_request(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"])
    run(asked, tmp_path)
    run(replace(asked, keep=True), tmp_path)
    (kept,) = (tmp_path / "models").iterdir()
    assert load_model(kept).config.quantization_config.format == "nf3"
    run(question(tiny_model_dir, keep=True), tmp_path)
    run(replace(asked, schemes=["nf3-sym-g32"]), tmp_path)
    assert kept.exists() and len(list((tmp_path / "models").iterdir())) == 3


def test_peers_stand_beside_ours_and_their_troubles_do_not_stop_us(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        raise RuntimeError("no luck")

    exact = Peer("exact", "torch", lambda weight: (weight.clone(), weight.nbytes), 1)
    made = (
        exact,
        Peer("failing", "torch", fail, 1),
        Peer("wide", "torch", fail, 64),
        Peer("absent", "absent", fail, 1),
    )
    monkeypatch.setattr("afpq.comparison.peers.PEERS", made)
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"], peers=True)
    agenda = make_agenda(asked)
    comparison = Comparison(asked, agenda, tmp_path)
    results = comparison.run(lambda *_: None, lambda note: None)
    assert [str(r.cell) for r in results] == ["float", "nf3-sym-g64 rtn", "exact torch"]
    peer = results[2]
    assert peer.kl == pytest.approx(0, abs=1e-9) and peer.bits_per_weight == 32 and peer.speed is None
    assert len(peer.layers) == 14 and all(layer.weight == 0 for layer in peer.layers)
    wide, failing = comparison.left_out
    assert "torch wide" in wide and "torch failing failed: RuntimeError: no luck" in failing
    lines = describe_setting(comparison, results).lines()
    assert any("no luck" in line for line in lines) and any("not installed: absent" in line for line in lines)


def test_a_real_peer_is_within_its_bits(tiny_model_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    results, _, _ = run(question(tiny_model_dir, schemes=["nf4-sym-g64"], peers=True), tmp_path)
    found = {r.cell: r for r in results}
    peer = found[Cell("nf4-b64", "bitsandbytes")]
    assert peer.bits_per_weight == pytest.approx(4.5) and 0 < peer.kl < 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown scheme": ({"schemes": ["nf4"]}, "nf4.*expected FORMAT"),
    "unknown format": ({"schemes": ["nf3-sym-g64", "nf9-sym-g64"]}, "nf9.*known"),
    "no scheme": ({"schemes": ["", " "]}, "--schemes"),
    "no method": ({"methods": [""]}, "--methods"),
    "unknown method": ({"methods": ["rtn", "magic"]}, "magic.*known"),
    "no calibration text": ({"methods": ["rtn", "gptq"]}, "gptq needs.*--calibration-text"),
    "a text shorter than a window": ({"text": "short"}, "5 tokens is shorter than a window of 32.*--seq-len"),
    "fewer tokens than a window": ({"max_tokens": 20}, "20 tokens is shorter than a window of 32"),
    "windows of one": ({"seq_len": 1}, "length"),
    "one token": ({"max_tokens": 1}, "at least 2"),
    "a text of one token": ({"text": "x"}, "at least 2"),
    "no model": ({"model": "/no/such/dir"}, "/no/such/dir"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_are_refused_before_any_work(tiny_model_dir: Path, case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(AfpqError, match=words):
        make_agenda(replace(question(tiny_model_dir), **changes))


def test_schemes_named_twice_are_measured_once(tiny_model_dir: Path) -> None:
    agenda = make_agenda(question(tiny_model_dir, schemes=["nf3-sym-g64", " nf3-sym-g64"], methods=["rtn", "rtn"]))
    assert [str(task.cell) for task in agenda.tasks] == ["float", "nf3-sym-g64 rtn"]


def test_a_report_needs_no_network_and_is_whole(tiny_model_dir: Path, finished: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, text_name="<text> & more")
    agenda = make_agenda(asked)
    comparison = Comparison(asked, agenda, finished)
    results = comparison.run(lambda *_: None, lambda note: None)
    about = describe_setting(comparison, results)
    written = write_comparison(tmp_path, about, results, asymmetries(agenda, results))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    assert sorted(written) == sorted(tmp_path.iterdir())
    html = (tmp_path / "report.html").read_text("utf-8")
    for name in ("nf3-asym-g64", "nf3-sym-g32", "float"):
        assert name in html and name in (tmp_path / "report.md").read_text("utf-8")
    assert "&lt;text&gt; &amp; more" in html and "http" not in html and "@import" not in html and "url(" not in html
    assert html.count("<svg") == html.count("</svg>") > 6
