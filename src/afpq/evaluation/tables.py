# SPDX-License-Identifier: MIT
"""Figures as text, and tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """Format a figure and its standard error, if it has one (a single sample has none)."""
    known = error is not None and math.isfinite(error)
    return f"{value or 0:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def size_text(count: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int | None = None) -> str:
    """Write a Markdown table of cells; all but the first `text_columns` hold numbers, aligned to the right."""
    right = len(header) if text_columns is None else text_columns
    kinds = ["---" if index < right else "---:" for index in range(len(header))]
    lines = [header, kinds, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
