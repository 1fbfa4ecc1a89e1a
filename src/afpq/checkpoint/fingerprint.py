# SPDX-License-Identifier: MIT
"""What decides a result, as data, so that a run that differs from an earlier one can name what differs.

A fingerprint maps names to values; `SETTINGS` holds the settings by name, the other values are digests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from afpq.checkpoint.atomic_files import digest_value
from afpq.recipe import Recipe

CODE_BOOKS, SETTINGS = "code book", "settings"
TEXT, DRAWN_BY = (
    "text",
    ("number of samples", "length of windows", "seed"),
)  # the text's digest is that of the windows drawn
SCHEME, OVERRIDES, HEAD, EMBEDDING = "scheme", "list of overrides", "scheme of the head", "scheme of the embedding"
BUDGET = "budget of bits"
# What follows from other settings is not named beside them: windows from how they are drawn, schemes from a budget.
FOLLOWS = {
    TEXT: DRAWN_BY,
    CODE_BOOKS: (SCHEME, OVERRIDES, HEAD, EMBEDDING, BUDGET),
    SCHEME: (BUDGET,),
    OVERRIDES: (BUDGET,),
}
MAX_VALUE = 60  # letters of a value in a message


def recipe_settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's settings by name, as JSON values."""
    return {
        SCHEME: str(recipe.scheme),
        "method": recipe.method,
        "scale search": recipe.search,
        "list of skips": list(recipe.skip),
        OVERRIDES: [f"{pattern}={scheme}" for pattern, scheme in recipe.overrides],
        HEAD: None if recipe.lm_head is None else str(recipe.lm_head),
        EMBEDDING: None if recipe.embedding is None else str(recipe.embedding),
        "number of end pass steps": recipe.end_pass,
        **{name.replace("_", " "): value for name, value in asdict(recipe.solver_options).items()},
    }


def code_books(recipe: Recipe) -> str:
    """Return a digest of the values of all code books, since a format of the user's may have any name."""
    schemes = (recipe.scheme, *(scheme for _, scheme in recipe.overrides), recipe.lm_head, recipe.embedding)
    return digest_value([None if scheme is None else [scheme.format.name, *scheme.format.values] for scheme in schemes])


def differences(old: Any, new: Mapping[str, Any]) -> list[str]:
    """Return what differs between an earlier fingerprint and this one, in words that "another" goes before."""
    old = old if isinstance(old, dict) else {}
    named: dict[str, str] = {}
    for key, value in new.items():
        before = old.get(key)
        if key == SETTINGS and isinstance(before, dict):
            both = dict.fromkeys([*before, *value])
            named |= {n: _change(before, value, n) for n in both if before.get(n) != value.get(n)}
        elif before != value:
            named[key] = "set of settings" if key == SETTINGS else key
    return [words for name, words in named.items() if not any(cause in named for cause in FOLLOWS.get(name, ()))]


def _change(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    return f"{name} ({_text(before.get(name))}, now {_text(now.get(name))})"


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(_text, value))
    text = "none" if value is None or value == "" else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."
