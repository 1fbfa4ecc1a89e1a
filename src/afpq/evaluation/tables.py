# SPDX-License-Identifier: MIT
"""Results as a table, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A figure and its standard error, which a single sample does not have."""
    known = error is not None and math.isfinite(error)
    return f"{value or 0:.{digits}f}" + (f" ± {error:.{digits}f}" if known else "")


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int | None = None) -> str:
    """A Markdown table of cells; the columns behind the first `text_columns` hold numbers, and go to the right."""
    right = len(header) if text_columns is None else text_columns
    kinds = ["---" if index < right else "---:" for index in range(len(header))]
    lines = [header, kinds, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
