# SPDX-License-Identifier: MIT
"""What a comparison shows: paired by window, no more than the standard errors allow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comparisons import HALF, ORIGINAL, TWO, ZERO, result
from hypothesis import given
from hypothesis import strategies as st

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
    findings = "\n".join(sentences([ORIGINAL, TWO, HALF, ZERO]))
    assert "Best with 3 bits and a fraction: nf3-asym-g128 rtn (3.250 true bits, KL x 1000 31.00)" in findings
    assert "int3-asym-g128 rtn (3.148), nf3-asym-g128 rtn (3.250); every other cell has" in findings
    assert "against nf3-sym-g64 rtn, at equal bits: two scales are better by 9 % of the KL" in findings
    assert "against int3-asym-g128 rtn, which has 0.10 bits less: two scales are better" in findings
    assert "Not measured" not in findings
    assert sentences([ORIGINAL]) == []


def test_what_was_not_measured_is_one_line_at_the_end() -> None:
    other = result("nf4-asym-g128", "rtn", 4.25, 0.01)
    *others, last = sentences([ORIGINAL, TWO, other])
    assert last == (
        "Not measured, and needed to judge two scales at equal bits: nf3-sym-g64 rtn, int3-asym-g128 rtn, "
        "nf4-sym-g64 rtn, int4-asym-g128 rtn."
    )
    assert not any("measured" in sentence for sentence in others)
