# SPDX-License-Identifier: MIT
"""Check that every pattern a user gives matches something: a misspelt one would silently do nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from afpq.errors import AfpqError
from afpq.recipe import Recipe, is_kept, name_of

# Given by habit for every model, because the configs of other tools need it; one without a head has nothing to leave.
BY_HABIT = ("lm_head",)


def check_patterns(recipe: Recipe, linears: Sequence[str], tensors: Iterable[str]) -> None:
    """Check the recipe's patterns; `linears` are those of the blocks, `tensors` the names of all of the model's.

    A skip may also name what stays as it is anyway, such as a norm or the head. Raises AfpqError naming a pattern that
    matches nothing, and the nearest name.
    """
    others = other_modules(linears, tensors)
    for pattern in recipe.skip:
        if not _searched(pattern, linears) and not _searched(pattern, others):
            raise AfpqError(f"skip {pattern!r} (--skip) matches no linear layer of the model{_near(pattern, linears)}")
    known = set(linears)
    for pattern, scheme in recipe.overrides:
        exact = name_of(pattern)
        if exact in known if exact is not None else _searched(pattern, linears):
            continue
        what = f"override {pattern!r} (--override)"
        if _searched(pattern, others):
            raise AfpqError(
                f"{what} matches no linear layer inside the model's blocks; the head and the embedding take their "
                f"scheme from --lm-head {scheme} and --embedding {scheme}"
            )
        raise AfpqError(f"{what} matches no linear layer of the model{_near(pattern, linears)}")


def check_entries(entries: Iterable[str], linears: Sequence[str], tensors: Iterable[str]) -> None:
    """Check the entries of `modules_to_not_convert` in the same way."""
    others = other_modules(linears, tensors)
    for entry in entries:
        if entry in BY_HABIT or any(is_kept(name, [entry]) for name in (*linears, *others)):
            continue
        raise AfpqError(f"modules_to_not_convert: {entry!r} is no module of the model{_near(entry, linears)}")


def other_modules(linears: Sequence[str], tensors: Iterable[str]) -> list[str]:
    """Return the modules with tensors of their own that are no linears of the blocks."""
    known = set(linears)
    return [name for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors) if name not in known]


def _searched(pattern: str, names: Iterable[str]) -> bool:
    return any(re.search(pattern, name) is not None for name in names)


def _near(pattern: str, linears: Sequence[str]) -> str:
    """Return the nearest name, or part of one, as the end of a message."""
    parts = dict.fromkeys(part for name in linears for part in (name, *name.split(".")) if not part.isdigit())
    word = re.sub(r"\\|^\W+|\W+$", "", pattern)
    near = get_close_matches(word, parts, 1) or get_close_matches(word.rpartition(".")[2], parts, 1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; its linears have names such as {linears[0]}" if linears else ""
