# SPDX-License-Identifier: MIT
"""The card's figures: the same as `afpq eval`'s, on text that calibration did not use, and never at any cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import afpq
from afpq import Recipe, parse_scheme
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import sample_windows, tokenize, unused_windows, window_starts, windows
from afpq.jobs.card_sample import (
    MAX_LENGTH,
    MAX_WINDOWS,
    CardFigures,
    CardText,
    WindowDraw,
    card_text_of,
    measure_card_text,
    unused_card_text,
)
from afpq.jobs.execute import execute
from afpq.jobs.prepare import CalibrationSettings, Job, Texts, prepare

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
RECIPE = Recipe(parse_scheme("nf3-asym-g64"))
SMALL = CalibrationSettings(samples=4, seq_len=48)


@given(
    total=st.integers(2, 400), count=st.integers(1, 12), used=st.integers(2, 60), length=st.integers(1, 60),
    limit=st.integers(1, 10), seed=st.integers(0, 99),
)  # fmt: skip
def test_unused_windows_touch_no_window_used(
    total: int, count: int, used: int, length: int, limit: int, seed: int
) -> None:
    tokens = torch.arange(total)
    starts = window_starts(total, count, used, seed)
    taken = set(sample_windows(tokens, count, used, seed).flatten().tolist())
    found = unused_windows(tokens, starts, used, length, limit)
    assert found.shape[1] == length and len(found) <= limit
    flat = found.flatten().tolist()
    assert len(set(flat)) == len(flat) and not taken & set(flat)
    assert all(window.tolist() == list(range(int(window[0]), int(window[0]) + length)) for window in found)
    free = sorted(set(range(total)) - taken)
    if len(found) < limit:  # then no more would fit: fewer than a window's tokens are left of every gap
        gaps = sum(1 for i, place in enumerate(free) if i == 0 or place != free[i - 1] + 1)
        assert len(free) - len(flat) <= gaps * (length - 1)


def test_what_is_measured_on() -> None:
    tokens = torch.arange(100_000)
    apart = unused_card_text(WindowDraw(tokens, 8, 1024, 0), "a.txt")
    assert apart.windows.shape == (MAX_WINDOWS, MAX_LENGTH) and "did not use" in apart.origin
    assert apart.windows[-1, 0] > 50_000 > apart.windows[0, 0]  # spread over the text
    full = unused_card_text(WindowDraw(tokens[:1000], 8, 300, 0), "a.txt")
    assert full.windows.shape == (8, 300) and "flattering" in full.origin
    short = unused_card_text(WindowDraw(tokens[:9], 8, 300, 0), "a.txt")
    assert torch.equal(short.windows, tokens[None, :9])
    assert torch.equal(card_text_of(tokens, 2048, "b.txt").windows, windows(tokens, 512)[:16])


def origin(job: Job) -> str:
    return job.sample if isinstance(job.sample, str) else job.sample.origin


def test_the_sample_follows_what_was_given(tiny_model_dir: Path) -> None:
    gptq = Recipe(parse_scheme("nf3-asym-g64"), "gptq")
    assert "no text" in origin(prepare(tiny_model_dir, RECIPE))
    assert "no part" in origin(prepare(tiny_model_dir, RECIPE, Texts(TEXT, calibration_name="a.txt")))
    assert "did not use" in origin(prepare(tiny_model_dir, gptq, Texts(TEXT, calibration_name="a.txt"), settings=SMALL))
    assert origin(prepare(tiny_model_dir, gptq, Texts(TEXT, "other text", "a.txt", "b.txt"))) == "b.txt"
    assert "switched off" in origin(prepare(tiny_model_dir, gptq, Texts(TEXT, evaluate=False)))
    with pytest.raises(AfpqError, match="choose one"):
        prepare(tiny_model_dir, RECIPE, Texts(None, TEXT, evaluate=False))


def test_measuring_changes_no_weight(tiny_model_dir: Path) -> None:
    """So a stopped run may go on with another text to measure on."""
    plain, other = (prepare(tiny_model_dir, RECIPE, Texts(None, text)).fingerprint() for text in (None, TEXT))
    assert plain == other


def test_figures_are_those_of_eval(tiny_model_dir: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    outcome = execute(
        prepare(tiny_model_dir, RECIPE, Texts(None, TEXT)), tmp_path / "out", progress=lambda *c: calls.append(c)
    )
    found = outcome.measured
    assert isinstance(found, CardFigures)
    original, small = load_model(tiny_model_dir), load_model(tmp_path / "out")
    stream = windows(tokenize(load_tokenizer(tiny_model_dir), TEXT), 128)[:16]
    expected = evaluate(small, stream, logits_of(original, stream))
    assert found.result.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert found.result.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert found.original == pytest.approx(evaluate(original, stream).perplexity, rel=1e-5)
    assert found.to_json()["windows"] == 16 and found.to_json()["original_perplexity"] == found.original
    assert calls[-1][0] == "measuring 16 of 16" and calls[-1][1] == calls[-1][2]


def test_too_large_for_the_memory_is_told(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afpq.jobs.card_sample.available_memory", lambda: 1000)
    afpq.quantize(tiny_model_dir, tmp_path / "out", eval_text=TEXT)
    assert "were not measured: the original and this model together" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AfpqError("no tensor"), "no tensor"),
        (RuntimeError("no such\n op"), "no such op"),
        (RuntimeError("CUDA error: out of memory,\n sorry"), "out of memory (CUDA error: out of memory, sorry): use a"),
        (torch.OutOfMemoryError("8 GiB"), "out of memory (8 GiB): use a"),
        (MemoryError(), "out of memory (no details): use a"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_measured_is_told(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("afpq.jobs.card_sample.load_model", fail)
    plan = prepare(tiny_model_dir, RECIPE).plan
    sample = CardText(torch.zeros(1, 4, dtype=torch.int64), "zeros")
    reason = measure_card_text(plan, tiny_model_dir, sample, torch.device("cpu"))
    assert isinstance(reason, str) and reason.startswith(expected)
