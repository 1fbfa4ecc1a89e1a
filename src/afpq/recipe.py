# SPDX-License-Identifier: MIT
"""Recipe: what is done to a whole model, as a value; and the methods it names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from afpq.algorithms.solver_options import GptqOptions
from afpq.errors import AfpqError
from afpq.numerics.scale_search import SCALE_SEARCHES
from afpq.numerics.scheme import Scheme, parse_scheme


def is_kept(name: str, kept: Iterable[str]) -> bool:
    """Whether `modules_to_not_convert` names the module: its whole name, a parent, its last parts, or a pattern.

    A name saved with the base model's prefix also matches a model loaded without it, such as AutoModel's.
    """
    return any(
        name == entry
        or name.startswith(f"{entry}.")
        or name.endswith(f".{entry}")
        or entry.endswith(f".{name}")
        or _matches(entry, name)
        for entry in kept
    )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):  # a name need not be a pattern
        return False


SAME = "same"  # says that the head or the embedding has the scheme of the blocks


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
