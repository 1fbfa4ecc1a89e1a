# SPDX-License-Identifier: MIT
"""Recipe: what is done to a whole model, as a value."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, wraps
from typing import Any

from afpq.algorithms.methods import METHODS, NEAREST, Traits
from afpq.algorithms.solver_options import GptqOptions, SolverOptions
from afpq.errors import AfpqError
from afpq.numerics.scheme import SCALE_SEARCHES, Scheme, parse_scheme


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


SAME = "same"  # the head or the embedding has the scheme of the blocks


def options_from(given: SolverOptions, method: str) -> SolverOptions | None:
    """The options of `method` that `given`, of any method, contains; None for an unknown method."""
    if method not in METHODS:
        return None
    kind = METHODS[method].options
    return kind(**{part.name: getattr(given, part.name) for part in fields(kind) if hasattr(given, part.name)})


def warn_of_gptq() -> None:
    """Warn that `gptq` is the name that `options` had before."""
    warnings.warn("gptq= is called options= now; the old name goes with the next version", DeprecationWarning, 3)


def _takes_gptq(recipe: type[Recipe]) -> type[Recipe]:
    """Accept `gptq`, the name that `options` had before, in the constructor and as an attribute."""
    init: Any = recipe.__init__

    @wraps(init)
    def __init__(self: Recipe, *values: Any, gptq: GptqOptions | None = None, **named: Any) -> None:
        init(self, *values, **named)
        if gptq is not None:
            warn_of_gptq()
            object.__setattr__(self, "options", options_from(gptq, self.method))

    def old_name(self: Recipe) -> GptqOptions:
        warn_of_gptq()
        given = self.solver_options
        return given if isinstance(given, GptqOptions) else GptqOptions()

    setattr(recipe, "__init__", __init__)  # noqa: B010  (mypy forbids the assignment)
    setattr(recipe, "gptq", property(old_name))  # noqa: B010
    return recipe


@_takes_gptq
@dataclass(frozen=True)
class Recipe:
    """A scheme, a method, and what to leave alone (`skip`) or store otherwise (`overrides`).

    They concern the linears of the blocks. All else is left alone, except the output head and the embedding of tokens
    if `lm_head` and `embedding` contain schemes for them; tied ones are one weight of one scheme.

    Patterns are regular expressions searched in module names, such as `model.layers.0.self_attn.q_proj`; the first
    override that matches wins. Those of a single name (`exactly`) may be thousands: they are looked up.

    `options` are the method's, of the type in its row of METHODS; None for its defaults. `end_pass`: steps of tuning
    scales, norms and biases together at the end (`end_pass.py`).

    Raises AfpqError for an unknown method or search, options of another method, or a pattern that does not compile.
    """

    scheme: Scheme
    method: str = NEAREST
    _: KW_ONLY
    scale_search: str | None = None  # absmax for plain rtn, as in the paper; mse if there is data
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Scheme], ...] = ()
    options: SolverOptions | None = None
    lm_head: Scheme | None = None
    embedding: Scheme | None = None
    end_pass: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AfpqError(f"method {self.method!r}; known: {', '.join(METHODS)}")
        kind = METHODS[self.method].options
        if self.options is not None and type(self.options) is not kind:
            wanted = kind.__name__ if fields(kind) else "no options"
            raise AfpqError(f"method {self.method!r} takes {wanted}, got {type(self.options).__name__}")
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

    @property
    def solver_options(self) -> SolverOptions:
        """The options, the method's defaults if none were given."""
        return METHODS[self.method].options() if self.options is None else self.options

    @property
    def traits(self) -> Traits:
        """What the method needs with these options."""
        return METHODS[self.method].traits(self.solver_options)

    def scheme_for(self, name: str) -> Scheme | None:
        """Return the scheme of the linear called `name`; None if it is skipped."""
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
