# SPDX-License-Identifier: MIT
"""Rows of a comparison: rounded by their errors, in order, the front in bold."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from comparisons import HALF, ORIGINAL, TWO, ZERO

from afpq.comparison.rows import HEADER, PAIR_HEADER, About, in_order, markdown, on_front, pair_rows, plus_minus, row

RESULTS = [ORIGINAL, TWO, HALF, ZERO]
ABOUT = About("a model", "a text", (6, 100), None, "a machine", 0.5, ("A note.",))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((12.3456, 0.0123), "12.346 ±0.012"),
        ((12.3456, 1.5), "12.3 ±1.5"),
        ((12.3456, 150.0), "12 ±150"),
        ((12.3456, 1e-9), "12.3456 ±0.0000"),
        ((12.3456, math.nan), "12.35"),
        ((12.3456, 150.0, True), "+12 ±150"),
        ((12.3456, 150.0, False, 2), "12.35 ±150.00"),
    ],
)
def test_a_figure_has_the_digits_of_its_error(arguments: tuple[float, float], expected: str) -> None:
    assert plus_minus(*arguments) == expected


def test_the_float_model_is_first_then_fewer_bits_then_lower_kl() -> None:
    assert in_order([HALF, ZERO, ORIGINAL, TWO]) == [ORIGINAL, ZERO, TWO, HALF]


def test_a_row_has_a_text_for_each_heading_and_none_for_what_was_not_measured() -> None:
    cells = dict(zip(HEADER, row(TWO, ORIGINAL), strict=True))
    assert (cells["scheme"], cells["method"], cells["true bits"]) == ("nf3-asym-g128", "rtn", "3.250")
    assert cells["KL x 1000"] == "31.0 ±3.1" and cells["seconds to quantize"] == ""
    assert row(replace(TWO, seconds=1.25, speed=0.5), ORIGINAL)[-2:] == ("1.2", "0.50")
    assert row(ORIGINAL, ORIGINAL)[3] == row(ORIGINAL, ORIGINAL)[5] == ""


def test_pairs_are_compared_or_named_as_missing() -> None:
    rows = pair_rows(RESULTS)
    assert all(len(cells) == len(PAIR_HEADER) for cells in rows)
    assert [cells[:3] for cells in rows] == [
        ("nf3-asym-g128 rtn", "nf3-sym-g64 rtn", "3.250 : 3.250"),
        ("nf3-asym-g128 rtn", "int3-asym-g128 rtn", "3.250 : 3.148"),
    ]
    assert rows[0][4].startswith("at equal bits: two scales are better")
    assert pair_rows([ORIGINAL, TWO])[0][3:] == ("", "not measured: add nf3-sym-g64 to see")


def test_markdown_has_every_cell_and_the_front_in_bold() -> None:
    assert on_front(RESULTS) == {"nf3-asym-g128 rtn", "int3-asym-g128 rtn"}
    text = markdown("A title", ["A finding."], ABOUT, RESULTS)
    assert text.startswith("# A title\n") and "- A finding.\n" in text and "- A note.\n" in text
    assert "| **nf3-asym-g128** | rtn |" in text and "| nf3-sym-g64 | rtn |" in text
    assert "6 windows of 100 tokens" in text and "594 predicted tokens" in text and "50.0 %" in text
