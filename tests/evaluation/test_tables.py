# SPDX-License-Identifier: MIT
"""Figures as text, and tables in Markdown."""

from __future__ import annotations

import math

import pytest

from afpq.evaluation.tables import size_text, table, with_error


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(1.2345, 0.1, "1.23 ± 0.10"), (1.2345, math.nan, "1.23"), (1.2345, None, "1.23"), (None, None, "0.00")],
)
def test_an_error_is_shown_if_there_is_one(value: float | None, error: float | None, expected: str) -> None:
    assert with_error(value, error, 2) == expected


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 1_234_567, 999_994_999, 1_000_000_000)] == [
        "0.00 MB", "1.23 MB", "999.99 MB", "1.00 GB"
    ]  # fmt: skip


def test_a_table_escapes_bars_and_aligns_numbers() -> None:
    lines = table(("name", "bits"), [("a|b", "3")], text_columns=1).splitlines()
    assert lines == ["| name | bits |", "| --- | ---: |", "| a\\|b | 3 |"]
    assert table(("name", "bits"), []).splitlines()[1] == "| --- | --- |"
