# SPDX-License-Identifier: MIT
"""The embedded model: small, licensed, better than counting letters, and telling symmetric from asymmetric."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from afpq.demo.demo_report import Row
from afpq.demo.run_demo import HELD_OUT, MODEL, SEQUENCE, run_demo
from afpq.evaluation.text import tokenize, windows

MAX_TOKENS = 4096
FILES = {"config.json", "model.safetensors", "tokenizer.json", "held_out.txt", "README.md", "LICENSE-PYTHON"}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    rows = run_demo(schemes=("nf3-sym-g128", "nf3-asym-g128"), max_tokens=MAX_TOKENS)
    assert [row.scheme for row in rows[1:]] == ["nf3-sym-g128", "nf3-asym-g128"]
    return {"float": rows[0], "sym": rows[1], "asym": rows[2]}


def unigram_perplexity() -> float:
    """Of the best model without context: the counts (plus one) of the very tokens that are predicted."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stream = windows(tokenize(tokenizer, HELD_OUT.read_text("utf-8")), SEQUENCE, MAX_TOKENS)
    tokens = stream[:, 1:].flatten().tolist()
    counts, total = Counter(tokens), len(tokens) + len(tokenizer)
    return math.exp(-sum(count * math.log((count + 1) / total) for count in counts.values()) / len(tokens))


def test_the_files_are_there_and_small() -> None:
    present = {path.name for path in MODEL.iterdir()}
    assert present >= FILES
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 6_000_000
    assert "Python Software Foundation" in (MODEL / "LICENSE-PYTHON").read_text("utf-8")


def test_the_model_has_learned(rows: dict[str, Row]) -> None:
    assert rows["float"].evaluation.perplexity < 0.5 * unigram_perplexity()


def test_rounding_costs_and_two_scales_cost_less(rows: dict[str, Row]) -> None:
    original, sym, asym = (rows[key].evaluation for key in ("float", "sym", "asym"))
    assert sym.perplexity > 1.02 * original.perplexity
    assert asym.perplexity > 1.02 * original.perplexity
    assert sym.kl_divergence is not None and asym.kl_divergence is not None
    assert 0 < asym.kl_divergence < sym.kl_divergence


def test_the_sizes_are_true(rows: dict[str, Row]) -> None:
    file = (Path(MODEL) / "model.safetensors").stat().st_size
    assert rows["float"].bits_per_weight == 16
    assert rows["float"].megabytes <= 1.01 * file / 1e6
    assert 3.125 <= rows["sym"].bits_per_weight < 3.25
    assert 3.25 <= rows["asym"].bits_per_weight < 3.5
    assert rows["sym"].megabytes < rows["asym"].megabytes < rows["float"].megabytes / 2
