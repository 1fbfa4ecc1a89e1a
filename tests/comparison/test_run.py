# SPDX-License-Identifier: MIT
"""A comparison: figures as the library's own, finished cells kept, changes noticed, nothing lost by a stop."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import SETTINGS, TEXT, question, run_comparison

from afpq.comparison import measure_cell as module
from afpq.comparison.cells import FLOAT
from afpq.comparison.peers import Peer
from afpq.comparison.run import Comparison, asymmetries, describe_setting
from afpq.comparison.tasks import Question, make_agenda
from afpq.evaluation.loading import load_model


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three cells; tests that change it copy nothing, since they only add."""
    directory = tmp_path_factory.mktemp("finished")
    run_comparison(question(tiny_model_dir), directory)
    return directory


def test_finished_cells_are_kept_without_loading_a_model(
    tiny_model_dir: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    results, notes, _ = run_comparison(question(tiny_model_dir), finished)
    assert len(results) == 3 and all("kept" in note for note in notes)


def test_other_schemes_add_to_what_is_there(tiny_model_dir: Path, finished: Path) -> None:
    results, notes, agenda = run_comparison(question(tiny_model_dir, schemes=["int3-asym-g64"]), finished)
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
    run_comparison(question(tiny_model_dir, schemes=["nf3-asym-g64"]), tmp_path)
    first, _, _ = run_comparison(asked, tmp_path)
    other = change(asked)
    agenda = make_agenda(other)
    comparison, notes = Comparison(other, agenda, tmp_path), []
    second = comparison.run(lambda *_: None, notes.append)
    assert f"nf3-sym-g64 rtn: was measured with another {word}, which is kept; measured anew" in notes
    reason = (
        f"float, nf3-asym-g64 rtn, nf3-sym-g64 rtn of an earlier run, with another {word} "
        "(the text, 4 windows of 32 tokens)"
    )
    assert comparison.left_out == [reason] and f"left out: {reason}" in notes
    assert f"Left out: {reason}." in describe_setting(comparison, second).lines()
    assert [str(r.cell) for r in second] == ["float", "nf3-sym-g64 rtn"]
    assert second[1].evaluation != first[1].evaluation


def test_nothing_measured_is_lost_to_another_text(
    tiny_model_dir: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first command again, after one with another length of windows, measures nothing."""
    shutil.copytree(finished / "cells", tmp_path / "cells")
    before = {path.name: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    run_comparison(question(tiny_model_dir, seq_len=16), tmp_path)
    assert all((tmp_path / "cells" / name).read_bytes() == content for name, content in before.items())
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    results, _, _ = run_comparison(question(tiny_model_dir), tmp_path)
    assert len(results) >= 3


def test_another_model_is_measured_again(tiny_copy: Path, tmp_path: Path) -> None:
    asked = question(tiny_copy, schemes=["nf3-sym-g64"])
    run_comparison(asked, tmp_path / "report")
    weights = tiny_copy / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    _, notes, _ = run_comparison(asked, tmp_path / "report")
    assert sum("another model, which is kept; measured anew" in note for note in notes) == 2


def test_other_calibration_is_measured_again_but_rtn_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"], methods=["rtn", "gptq"], calibration_text=TEXT.upper())
    run_comparison(asked, tmp_path)
    _, notes, _ = run_comparison(replace(asked, settings=replace(SETTINGS, seed=1)), tmp_path)
    assert ["measured anew" in note for note in notes[:3]] == [False, False, True]
    assert "another calibration text" in notes[2]
    assert notes[-1].startswith("left out: nf3-sym-g64 gptq of an earlier run, with another calibration text (the cal")


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
        run_comparison(question(tiny_model_dir), tmp_path)
    monkeypatch.setattr(module, "measure", real)
    names = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "cells").iterdir())
    assert names == ["float", "nf3-asym-g64_rtn"]
    monkeypatch.setattr(module, "execute", lambda *_, **__: pytest.fail("quantized again"))
    results, notes, _ = run_comparison(question(tiny_model_dir), tmp_path)
    assert [("kept" in note) for note in notes] == [True, True, False]
    assert results[2].seconds is None and results[1].seconds is not None
    assert not (tmp_path / "work").exists()


def test_quantized_models_are_kept_on_request(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = question(tiny_model_dir, schemes=["nf3-sym-g64"])
    first, _, _ = run_comparison(asked, tmp_path)
    second, _, _ = run_comparison(replace(asked, keep=True), tmp_path)
    assert second == first  # what was measured stays
    (kept,) = (tmp_path / "models").iterdir()
    assert load_model(kept).config.quantization_config.format == "nf3"
    run_comparison(question(tiny_model_dir, keep=True), tmp_path)
    run_comparison(replace(asked, schemes=["nf3-sym-g32"]), tmp_path)
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
