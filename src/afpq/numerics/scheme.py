# SPDX-License-Identifier: MIT
"""Scheme: how a weight is to be stored, as a value with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from afpq.errors import AfpqError
from afpq.numerics.formats import BITS, INTEGERS, NORMAL_FLOATS, Format, parse_format
from afpq.numerics.scale_storage import SCALE_STORAGES, ScaleStorage

# Of the schemes measured the most accurate for their bits, at 3 and at 4 (docs/LOG.md): two scales of a byte for 64.
DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE = 64, "log8"
DEFAULT_SCHEME = f"nf4-asym-g{DEFAULT_GROUP_SIZE}-{DEFAULT_SCALE_DTYPE}"

SCALE_SEARCHES = ("absmax", "mse")  # how scales are found: `scale_search.py`
UNNAMED_SCALE_DTYPE = "float16"  # which the text form leaves out
_SCHEME = re.compile(r"(?P<format>.+)-(?P<sym>sym|asym)-g(?P<group>-1|\d+)(?:-(?P<scale>[a-z][a-z0-9_]*))?")


@dataclass(frozen=True)
class Scheme:
    """Format + group size + symmetric or asymmetric + how scales are stored; text form `nf3-asym-g128`.

    `group_size` counts consecutive input weights of one row; -1 is the whole row. Asymmetric means one scale for
    each sign (AFPQ), or scale and zero point if the format is an integer. `scale_dtype` names a row of
    `scale_storage.SCALE_STORAGES`; other than float16 it ends the text form: `-float32` or `-log8`. A scheme is the
    same for all weights; `FittedScheme` is one settled for a weight. Raises AfpqError for a group size or storage that
    does not exist.
    """

    format: Format
    group_size: int
    sym: bool = False
    scale_dtype: str = UNNAMED_SCALE_DTYPE

    def __post_init__(self) -> None:
        if not (self.group_size == -1 or 1 <= self.group_size < 2**31):
            raise AfpqError(f"group size {self.group_size}: use a positive number, or -1 for one group a row")
        if self.scale_dtype not in SCALE_STORAGES:
            raise AfpqError(f"scale dtype {self.scale_dtype!r}; known: {', '.join(SCALE_STORAGES)}")

    @property
    def storage(self) -> ScaleStorage:
        """How the scales are stored."""
        return SCALE_STORAGES[self.scale_dtype]

    @property
    def two_scales(self) -> bool:
        """Whether each sign of a group has a scale of its own."""
        return not self.sym and not self.format.integer

    @property
    def zero_point(self) -> bool:
        """Whether a group has a zero point next to its scale."""
        return not self.sym and self.format.integer

    def groups(self, in_features: int) -> int:
        """Count the groups of a row; the last may be shorter."""
        return -(-in_features // self.span(in_features))

    def span(self, in_features: int) -> int:
        """Count the weights in a full group of a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def __str__(self) -> str:
        side = "sym" if self.sym else "asym"
        tail = "" if self.scale_dtype == UNNAMED_SCALE_DTYPE else f"-{self.scale_dtype}"
        return f"{self.format}-{side}-g{self.group_size}{tail}"


def parse_scheme(text: str) -> Scheme:
    """Parse `nf4-asym-g128`. Raises AfpqError naming what is wrong."""
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise AfpqError(f"scheme {text!r}: expected FORMAT-sym|asym-gSIZE, for example nf4-asym-g128")
    format = parse_format(match["format"])
    return Scheme(format, int(match["group"]), match["sym"] == "sym", match["scale"] or UNNAMED_SCALE_DTYPE)


def default_format(bits: int) -> Format:
    """Return the normal-float format of `bits`, or else the integer. Raises AfpqError for a width not in `BITS`."""
    if bits not in BITS:
        raise AfpqError(f"bits {bits}; possible: {', '.join(map(str, BITS))}")
    return NORMAL_FLOATS.get(bits, INTEGERS[bits])
