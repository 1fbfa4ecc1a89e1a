# SPDX-License-Identifier: MIT
"""Scheme: how one weight is stored. Recipe: what is done to a whole model. Both are values with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

from afpq.errors import AfpqError
from afpq.formats import BITS, FORMATS, Format, parse_format

SAME = "same"  # says that the head or the embedding has the scheme of the blocks
SCALE_BITS = {"float16": 16, "float32": 32, "log8": 8}  # scale_dtype -> bits of one stored scale
SCALE_SEARCHES = ("absmax", "mse")
ORDERS = ("group", "act", "none")


@dataclass(frozen=True)
class Method:
    """How codes are found: by which solver, after which transform; calibrated ones need text.

    Guided ones also need gradients of the model's predictions (`fisher.py`).
    """

    solver: str
    transform: str | None = None
    guided: bool = False

    @property
    def calibrated(self) -> bool:
        return self.solver != "rtn" or self.transform is not None


METHODS = {
    "rtn": Method("rtn"),
    "gptq": Method("gptq"),
    "awq": Method("rtn", "awq"),
    "awq+gptq": Method("gptq", "awq"),
    "tune": Method("gptq", guided=True),
}

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


@dataclass(frozen=True)
class GptqOptions:
    """`damp`: share of the Hessian's mean diagonal added to it. `order` of the columns: "group" (whole groups by
    importance, columns by importance inside), "act" (all columns, scales fixed beforehand) or "none". `sweeps` of
    coordinate descent afterwards. `float_target`: aim at the float model's outputs instead of repeating the errors of
    earlier layers. `sequential`: a layer sees the quantized layers before it inside its block too.
    """

    damp: float = 0.01
    order: str = "group"
    sweeps: int = 3
    float_target: bool = True
    sequential: bool = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise AfpqError(f"order {self.order!r}; known: {', '.join(ORDERS)}")
        if not 0 < self.damp < 1 or self.sweeps < 0:
            raise AfpqError(f"damp {self.damp} must lie between 0 and 1, sweeps {self.sweeps} must not be negative")


@dataclass(frozen=True)
class Recipe:
    """Scheme + solver + what to leave alone (`skip`) or store otherwise (`overrides`).

    They are about the linears of the blocks. What stands outside is left alone, but for the output head and the
    embedding of tokens where `lm_head` and `embedding` name schemes for them; tied ones are one weight of one scheme.

    Patterns are regular expressions searched in module names, such as `model.layers.0.self_attn.q_proj`; the first
    override that matches wins. Those of a single name (`exactly`) may be thousands: they are looked up. Raises
    AfpqError for an unknown method or search, or a pattern that does not compile.

    `end_pass`: steps of tuning scales, norms and biases together at the end (`end_pass.py`).
    """

    scheme: Scheme
    method: str = "rtn"
    scale_search: str | None = None  # absmax for plain rtn, as in the paper; mse where there is data
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Scheme], ...] = ()
    gptq: GptqOptions = field(default_factory=GptqOptions)
    lm_head: Scheme | None = None
    embedding: Scheme | None = None
    end_pass: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AfpqError(f"method {self.method!r}; known: {', '.join(METHODS)}")
        if self.search not in SCALE_SEARCHES:
            raise AfpqError(f"scale search {self.scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")
        if self.end_pass < 0:
            raise AfpqError(f"end pass of {self.end_pass} steps: use a positive number, or 0 for none")
        for pattern in (*self.skip, *(p for p, _ in self.overrides if name_of(p) is None)):
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise AfpqError(f"pattern {pattern!r} is not a regular expression: {error}") from None

    @property
    def search(self) -> str:
        """The scale search, the method's default if none was named."""
        return self.scale_search or ("mse" if METHODS[self.method].calibrated else "absmax")

    def scheme_for(self, name: str) -> Scheme | None:
        """The scheme of the linear called `name`; None if it is skipped."""
        if any(re.search(pattern, name) for pattern in self.skip):
            return None
        place, scheme = self._by_name.get(name, (len(self.overrides), self.scheme))
        return next((s for i, pattern, s in self._by_pattern if i < place and re.search(pattern, name)), scheme)

    @cached_property
    def _by_name(self) -> dict[str, tuple[int, Scheme]]:
        """Overrides that mean one name: the first for each, with its place among all."""
        found = reversed([(name_of(pattern), (i, scheme)) for i, (pattern, scheme) in enumerate(self.overrides)])
        return {name: value for name, value in found if name is not None}

    @cached_property
    def _by_pattern(self) -> list[tuple[int, str, Scheme]]:
        """The other overrides, with their places."""
        return [(i, p, scheme) for i, (p, scheme) in enumerate(self.overrides) if name_of(p) is None]


_EXACT = re.compile(r"\^((?:[\w-]|\\\.)+)\$")


def exactly(name: str) -> str:
    """The pattern that only this module's name matches."""
    return "^" + name.replace(".", "\\.") + "$"


def name_of(pattern: str) -> str | None:
    """The one name that a pattern matches, if it is written as `exactly` does."""
    match = _EXACT.fullmatch(pattern)
    return None if match is None else match[1].replace("\\.", ".")


def scheme_of_end(choice: str | Scheme | bool | None, scheme: Scheme) -> Scheme | None:
    """What was chosen for the head or the embedding: a scheme or its text, "same" or True for `scheme`, or nothing.

    Raises AfpqError as `parse_scheme` does.
    """
    if choice is None or choice is False:
        return None
    if choice is True or choice == SAME:
        return scheme
    return choice if isinstance(choice, Scheme) else parse_scheme(choice)


def default_format(bits: int) -> Format:
    """The normal-float format of `bits`; int8 for 8. Raises AfpqError for a width that cannot be stored."""
    if bits not in BITS:
        raise AfpqError(f"bits {bits}; possible: {', '.join(map(str, BITS))}")
    return FORMATS.get(f"nf{bits}", FORMATS["int8"])
