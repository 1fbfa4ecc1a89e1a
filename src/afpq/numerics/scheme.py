# SPDX-License-Identifier: MIT
"""Scheme: how one weight is stored. Recipe: what is done to a whole model. Both are values with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from afpq.errors import AfpqError
from afpq.numerics.formats import BITS, FORMATS, Format, parse_format

SCALE_BITS = {"float16": 16, "float32": 32, "log8": 8}  # scale_dtype -> bits of one stored scale

# Of the schemes measured the most accurate for their bits, at 3 and at 4 (docs/LOG.md): two scales of a byte for 64.
DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE = 64, "log8"
DEFAULT_SCHEME = f"nf4-asym-g{DEFAULT_GROUP_SIZE}-{DEFAULT_SCALE_DTYPE}"

_SCHEME = re.compile(r"(?P<format>.+)-(?P<sym>sym|asym)-g(?P<group>-1|\d+)(?:-(?P<scale>float\d+|log\d+))?")


@dataclass(frozen=True)
class ScaleGrid:
    """The 128 magnitudes a "log8" scale of one weight can have: 2^(low + step * k), k = 0 .. 127."""

    low: float
    step: float


@dataclass(frozen=True)
class Scheme:
    """Format + group size + symmetric or asymmetric + how scales are stored; text form `nf3-asym-g128`.

    `group_size` counts consecutive input weights of one row; -1 is the whole row. Asymmetric means one scale for
    each sign (AFPQ), or scale and zero point where the format is an integer. `scale_dtype` other than float16 ends
    the text form: `-float32`, or `-log8`, a byte of sign and logarithm on a `grid` fitted to each weight
    (`scales.fit_grid`); a scheme that no weight has been fitted to has none, and grids do not tell schemes apart.
    """

    format: Format
    group_size: int = 128
    sym: bool = False
    scale_dtype: str = "float16"
    grid: ScaleGrid | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.group_size == -1 or 1 <= self.group_size < 2**31):
            raise AfpqError(f"group size {self.group_size}: use a positive number, or -1 for one group a row")
        if self.scale_dtype not in SCALE_BITS:
            raise AfpqError(f"scale dtype {self.scale_dtype!r}; known: {', '.join(SCALE_BITS)}")

    @property
    def two_scales(self) -> bool:
        return not self.sym and not self.format.integer

    @property
    def zero_point(self) -> bool:
        return not self.sym and self.format.integer

    def groups(self, in_features: int) -> int:
        """Groups in a row; the last may be shorter."""
        return -(-in_features // self.span(in_features))

    def span(self, in_features: int) -> int:
        """Weights in a full group of a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def __str__(self) -> str:
        side = "sym" if self.sym else "asym"
        tail = "" if self.scale_dtype == "float16" else f"-{self.scale_dtype}"
        return f"{self.format}-{side}-g{self.group_size}{tail}"


def parse_scheme(text: str) -> Scheme:
    """`nf4-asym-g128` -> Scheme. Raises AfpqError naming what is wrong."""
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise AfpqError(f"scheme {text!r}: expected FORMAT-sym|asym-gSIZE, for example nf4-asym-g128")
    format = parse_format(match["format"])
    return Scheme(format, int(match["group"]), match["sym"] == "sym", match["scale"] or "float16")


def default_format(bits: int) -> Format:
    """The normal-float format of `bits`; int8 for 8. Raises AfpqError for a width that cannot be stored."""
    if bits not in BITS:
        raise AfpqError(f"bits {bits}; possible: {', '.join(map(str, BITS))}")
    return FORMATS.get(f"nf{bits}", FORMATS["int8"])
