# SPDX-License-Identifier: MIT
"""The size of quantized weights, and their true bits per weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A number of weights (`elements`) and the bytes they take, with their scales, zero points and codebooks."""

    bytes: int
    elements: int

    @property
    def bits(self) -> float:
        """True bits per weight. Raises ZeroDivisionError for no weights."""
        return 8 * self.bytes / self.elements

    def __add__(self, other: Size) -> Size:
        return Size(self.bytes + other.bytes, self.elements + other.elements)
