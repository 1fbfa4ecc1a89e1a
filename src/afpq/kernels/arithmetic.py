# SPDX-License-Identifier: MIT
"""The arithmetic of CPU layers, chosen for the whole process: "exact" or "int8" (see `cpu.py`)."""

from __future__ import annotations

from afpq.errors import AfpqError

MODES = ("exact", "int8")

_mode = "exact"


def set_compute(mode: str) -> str:
    """Choose the arithmetic of CPU layers, "exact" or "int8", for all threads; return the mode before.

    Raises AfpqError for another name.
    """
    global _mode
    if mode not in MODES:
        raise AfpqError(f"compute {mode!r}: choose from {', '.join(MODES)}")
    before, _mode = _mode, mode
    return before


def compute_mode() -> str:
    """Return the mode that `set_compute` chose last; "exact" at first."""
    return _mode
