# SPDX-License-Identifier: MIT
"""Sizes: bytes and weights add up, and bits are those of the sum."""

from __future__ import annotations

from afpq.numerics.size import Size


def test_bits_of_a_sum_are_weighted_by_the_elements() -> None:
    small, large = Size(10, 16), Size(48, 128)
    assert (small.bits, large.bits) == (5, 3)
    assert small + large == Size(58, 144)
    assert sum([small, large], Size(0, 0)).bits == 8 * 58 / 144
