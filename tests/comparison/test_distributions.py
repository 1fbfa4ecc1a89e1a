# SPDX-License-Identifier: MIT
"""How lopsided groups are, and which codes are used."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afpq import AfpqError, Scheme, parse_format
from afpq.comparison.distributions import BINS, asymmetry, code_counts, entropy, log_ratios, some_rows, spread

NF4 = parse_format("nf4")


@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32, -1]), st.integers(1, 5), st.integers(1, 50))
def test_ratios_are_those_of_the_groups(seed: int, group: int, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    step = columns if group == -1 else group
    expected = []
    for row in weight:
        for piece in row.split(step):
            high, low = max(piece.max().item(), 0), max(-piece.min().item(), 0)
            expected.append(math.inf if low == 0 else -math.inf if high == 0 else math.log2(high / low))
    found = log_ratios(weight, Scheme(NF4, group))
    torch.testing.assert_close(found.sort()[0], torch.tensor(expected).sort()[0], rtol=1e-4, atol=1e-4)
    counted = asymmetry([weight], group)
    assert sum(counted.counts) == len(expected) and len(counted.counts) == BINS
    assert counted.lopsided == pytest.approx(sum(abs(r) >= math.log2(1.1) for r in expected) / len(expected))


def test_mirrored_weights_mirror_the_histogram() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert asymmetry([-weight], 32).counts == asymmetry([weight], 32).counts[::-1]
    assert asymmetry([torch.cat([weight, -weight], 1)], 256).lopsided == 0


def test_groups_of_zeros_are_left_out_and_nan_is_an_error() -> None:
    assert sum(asymmetry([torch.zeros(4, 64)], 32).counts) == 0
    with pytest.raises(AfpqError, match="NaN"):
        asymmetry([torch.full((1, 4), math.nan)], 4)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=200))
def test_counts_and_entropy(codes: list[int]) -> None:
    counts = code_counts(torch.tensor(codes, dtype=torch.uint8), 16).tolist()
    assert counts == [codes.count(code) for code in range(16)]
    assert 0 <= entropy(counts) <= 4 + 1e-9
    assert entropy([7] * 16) == pytest.approx(4)
    assert entropy([0, 5, 0]) == 0


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_a_sample_is_spread_over_all(items: list[int], most: int) -> None:
    found = spread(range(len(items)), most)
    assert len(found) == min(most, len(items))
    assert list(found) == sorted(set(found))
    if len(items) > most > 1:
        assert found[-1] >= len(items) * (most - 1) // most


def test_rows_are_sampled() -> None:
    assert some_rows(torch.arange(10)[:, None], 5).flatten().tolist() == [0, 2, 4, 6, 8]
