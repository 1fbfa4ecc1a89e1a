# SPDX-License-Identifier: MIT
"""The one type of callback that long work reports its progress with."""

from __future__ import annotations

from collections.abc import Callable

# (what is being done, amount done, amount in all); the unit of the amounts is the caller's: weights, bytes, windows.
Progress = Callable[[str, int, int], None]
