# SPDX-License-Identifier: MIT
"""What a comparison says: paired by window, no more than the standard errors allow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afpq.comparison.cells import FLOAT, Cell, Result
from afpq.comparison.findings import (
    best_by_width,
    difference,
    kl_difference,
    pairs,
    pareto_front,
    rise,
    sentences,
    verdict,
)
from afpq.evaluation.perplexity import Evaluation

WINDOWS = [0.8, 1.4, 0.9, 1.1, 0.7, 1.3]


def result(scheme: str, method: str, bits: float, kl: float, shift: float = 0.0) -> Result:
    """KL of each window: `kl` times WINDOWS, which differ much, plus an alternating `shift`."""
    divergences = tuple(kl * w + shift * (-1) ** i for i, w in enumerate(WINDOWS))
    mean = sum(divergences) / len(divergences)
    losses = tuple(3 + d for d in divergences)
    evaluation = Evaluation(math.exp(3 + mean), 1.0, 600, mean, 0.1 * mean, 0.9)
    return Result(Cell(scheme, method), bits, 1.0, 1000, evaluation, losses, divergences)


ORIGINAL = Result(FLOAT, 16.0, 0.0, 4000, Evaluation(math.exp(3), 1.0, 600), (3.0,) * 6, ())
TWO = result("nf3-asym-g128", "rtn", 3.25, 0.0300)
HALF = result("nf3-sym-g64", "rtn", 3.25, 0.0330)
ZERO = result("int3-asym-g128", "rtn", 3.148, 0.0380)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=30))
def test_a_difference_is_the_paired_one(columns: list[tuple[float, float]]) -> None:
    first, second = (list(column) for column in zip(*columns))
    delta = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    found = difference(first, second)
    assert found.mean == pytest.approx(delta.mean().item(), abs=1e-12)
    assert found.error == pytest.approx(delta.std().item() / math.sqrt(len(delta)), abs=1e-9)


def test_noise_that_both_share_cancels() -> None:
    assert kl_difference(TWO, HALF).sure
    separate = math.hypot(*(0.12 * r.kl for r in (TWO, HALF)))  # as if the windows had been others for each
    assert abs(TWO.kl - HALF.kl) < 2 * separate


def test_the_rise_of_perplexity_is_paired_too() -> None:
    delta = rise(TWO, ORIGINAL)
    assert delta.mean == pytest.approx(TWO.evaluation.perplexity - math.exp(3))
    assert delta.error < 0.1 * TWO.evaluation.standard_error * math.exp(3)


@given(st.lists(st.tuples(st.floats(2, 5), st.floats(0.001, 0.1)), min_size=1, max_size=20))
def test_the_front_is_beaten_by_nobody_and_beats_the_rest(points: list[tuple[float, float]]) -> None:
    cells = [result(f"cell{i}", "x", bits, kl) for i, (bits, kl) in enumerate(points)]
    front = pareto_front(cells)
    for member in front:
        assert not any(o.bits_per_weight <= member.bits_per_weight and o.kl < member.kl for o in cells)
    for other in cells:
        assert any(m.bits_per_weight <= other.bits_per_weight and m.kl <= other.kl for m in front)


def test_two_scales_meet_one_scale_at_half_the_group_and_zero_points() -> None:
    found = {pair.kind: pair for pair in pairs([TWO, HALF, ZERO, result("int4-asym-g128", "rtn", 4.156, 0.01)])}
    assert found["one scale, half the group"].other is HALF
    assert found["scale and zero point"].other is ZERO
    assert "better by 9 %" in verdict(found["one scale, half the group"])
    missing = pairs([TWO, result("nf3-sym-g64", "gptq", 3.25, 0.01)])  # another method is no partner
    assert [verdict(pair) for pair in missing] == [
        "not measured: add nf3-sym-g64 to see",
        "not measured: add int3-asym-g128 to see",
    ]


def test_a_difference_within_the_noise_is_none() -> None:
    noisy = result("nf3-sym-g64", "rtn", 3.25, 0.0301, shift=0.01)
    (pair, _) = pairs([TWO, noisy])
    assert verdict(pair) == "no difference beyond the noise"
    assert best_by_width([TWO, noisy])[3] == [TWO, noisy]
    assert best_by_width([TWO, HALF])[3] == [TWO]


def test_one_window_cannot_tell() -> None:
    single = [replace(r, window_losses=(3.0,), window_divergences=(r.kl,)) for r in (TWO, HALF)]
    assert verdict(pairs(single)[0]) == "one window of text cannot tell"
    assert not kl_difference(*single).sure


def test_sentences_name_the_best_the_front_and_the_pairs() -> None:
    said = "\n".join(sentences([ORIGINAL, TWO, HALF, ZERO]))
    assert "Best with 3 bits and a fraction: nf3-asym-g128 rtn (3.250 true bits, KL x 1000 31.00)" in said
    assert "int3-asym-g128 rtn (3.148), nf3-asym-g128 rtn (3.250); every other cell has" in said
    assert "against nf3-sym-g64 rtn, at equal bits: two scales are better by 9 % of the KL" in said
    assert "against int3-asym-g128 rtn, which has 0.10 bits less: two scales are better" in said
    assert sentences([ORIGINAL]) == []
