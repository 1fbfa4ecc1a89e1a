# SPDX-License-Identifier: MIT
"""Codebooks as data: a format is a name and an ascending list of values; code i stands for values[i].

nf4 and nf3 are the codebooks of AFPQ (arXiv 2311.01792, appendix A), nf4 being bitsandbytes' NF4; nf2 is the same
construction at two bits (`tests/numerics/test_formats.py` rebuilds all three from quantiles of the normal
distribution). fp4 is E2M1 and fp3 E2M0, without infinities: 15 and 7 values, one code spare. A learned format stands
for a codebook fitted to each weight (`algorithms/learned_codebooks.py`); until then its values are those of nf, from
which the fit starts.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from afpq.errors import AfpqError

BITS = (2, 3, 4, 8)  # widths of a stored code; `packing.py` stores any width up to 8
TEXT_BYTES = len("-0.502:")  # of a value of a learned codebook in config.json
_CUSTOM = "lut:"


@dataclass(frozen=True)
class Format:
    """A codebook: code i stands for `values[i]`; values strictly ascend and lie on both sides of zero.

    `integer` marks evenly spaced codebooks, whose asymmetric form is a scale and a zero point instead of two scales.
    `learned`: every weight is to get a codebook of its own in this one's place. `name` is the text form and parses back
    to an equal format (`parse_format`). Raises AfpqError for values that do not fit this, or more than 256.
    """

    name: str
    values: tuple[float, ...]
    integer: bool = False
    learned: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise AfpqError("a format needs a name")
        try:
            values = struct.unpack(f"{len(self.values)}f", struct.pack(f"{len(self.values)}f", *self.values))
        except OverflowError:
            values = (math.inf,)
        if not all(math.isfinite(v) for v in values) or any(a >= b for a, b in pairwise(values)):
            raise AfpqError(f"format {self.name}: values must be finite and strictly ascending, as float32")
        if len(values) < 2 or values[0] >= 0 or values[-1] <= 0:
            raise AfpqError(f"format {self.name}: needs at least one value below and one above zero")
        if len(values) > 256:
            raise AfpqError(f"format {self.name}: {len(values)} values; 256 (8 bits) are the most")

    @property
    def bits(self) -> int:
        """Bits of a stored code: the smallest of `BITS` that can count the values."""
        return next(bits for bits in BITS if len(self.values) <= 2**bits)

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.values

    @property
    def start(self) -> Format:
        """The format that the fit of a learned one starts from; any other format itself."""
        return NORMAL_FLOATS[self.bits] if self.learned else self

    @property
    def codebook_bytes(self) -> int:
        """Bytes that saving the codebook itself takes: none if its name stands for it, else the text of each value."""
        return len(self.values) * TEXT_BYTES if self.learned or self.name.startswith(_CUSTOM) else 0

    def __str__(self) -> str:
        return self.name


def repeated_codebook_bytes(formats: Iterable[Format]) -> int:
    """Count the bytes that `codebook_bytes` counts once too often for each further weight of the same codebook.

    `formats` are those of all weights; a learned one stands for another codebook every time.
    """
    counts = Counter(format for format in formats if not format.learned)
    return sum((count - 1) * format.codebook_bytes for format, count in counts.items())


def _integer(bits: int) -> Format:
    half = 2 ** (bits - 1)
    return Format(f"int{bits}", tuple(float(v) for v in range(-half, half)), integer=True)


def _mirrored(name: str, magnitudes: tuple[float, ...]) -> Format:
    return Format(name, (*(-m for m in reversed(magnitudes)), 0.0, *magnitudes))


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NF3 = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
    0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip
_NF2 = (-1.0, 0.0, 0.43581816458311545, 1.0)

FORMATS = {
    format.name: format
    for format in (
        Format("nf4", _NF4),
        Format("nf3", _NF3),
        Format("nf2", _NF2),
        _mirrored("fp4", (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
        _mirrored("fp3", (1.0, 2.0, 4.0)),
        *(_integer(bits) for bits in BITS),
    )
}
NORMAL_FLOATS = {format.bits: format for format in FORMATS.values() if format.name.startswith("nf")}  # by width
INTEGERS = {format.bits: format for format in FORMATS.values() if format.integer}  # by width
LEARNED = {
    name: Format(name, NORMAL_FLOATS[bits].values, learned=True)
    for bits in sorted(NORMAL_FLOATS)
    for name in [f"learned{bits}"]
}


def custom_format(values: tuple[float, ...] | list[float]) -> Format:
    """Make a format of your own values, sorted here; its name, `lut:v0:v1:...`, contains them exactly.

    Raises AfpqError for duplicates, non-finite or one-sided values, or more than 256 of them.
    """
    ordered = tuple(sorted(float(v) + 0.0 for v in values))  # + 0.0 turns -0.0 into 0.0
    return Format(_CUSTOM + ":".join(repr(v) for v in ordered), ordered)


def parse_format(name: str) -> Format:
    """Parse `nf4`, `learned3`, ... or `lut:-1:-0.3:0:0.4:1`. Raises AfpqError that lists the known names."""
    known = FORMATS | LEARNED
    if name in known:
        return known[name]
    if name.startswith(_CUSTOM):
        try:
            return custom_format([float(text) for text in name.removeprefix(_CUSTOM).split(":")])
        except ValueError:
            raise AfpqError(f"format {name!r}: values must be numbers separated by ':'") from None
    raise AfpqError(f"unknown format {name!r}; known: {', '.join(known)}, or {_CUSTOM}VALUE:VALUE:...")
