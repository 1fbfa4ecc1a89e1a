# SPDX-License-Identifier: MIT
"""The `quantization_config` of a saved model: recipe -> JSON, JSON -> recipe, and which linears it covers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from afpq.algorithms.methods import NEAREST
from afpq.algorithms.solver_options import options_to_json
from afpq.errors import AfpqError
from afpq.numerics.formats import parse_format
from afpq.numerics.scheme import DEFAULT_SCHEME, Scheme, default_format, parse_scheme
from afpq.recipe import Recipe, name_of, scheme_of_end

QUANT_METHOD = "afpq"
# 2: the embedding is packed, or the head in a scheme of its own, which an afpq that reads only 1 would misread.
VERSIONS = (1, 2)
ENDS = ("lm_head", "embedding")


def scheme_to_json(scheme: Scheme) -> dict[str, Any]:
    """Return the keys that describe a scheme, in the field's names."""
    return {
        "bits": scheme.format.bits,
        "format": scheme.format.name,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "scale_dtype": scheme.scale_dtype,
    }


def scheme_from_json(keys: dict[str, Any], base: Scheme | None = None) -> Scheme:
    """Return the scheme of the keys given; missing ones come from `base`, or are those of DEFAULT_SCHEME.

    Raises AfpqError for a wrong type, and for `bits` that contradict `format`.
    """
    if not isinstance(keys, dict):
        raise AfpqError(f"quantization_config: {keys!r} should be an object of keys such as bits and format")
    name, bits = keys.get("format"), keys.get("bits")
    for key, kind in (("format", str), ("bits", int), ("group_size", int), ("sym", bool), ("scale_dtype", str)):
        value = keys.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise AfpqError(f"quantization_config: {key} is {value!r}; expected {kind.__name__}")
    base = base or parse_scheme(DEFAULT_SCHEME)
    default = base.format if bits is None else default_format(bits)
    format = default if name is None else parse_format(name)
    if bits is not None and bits != format.bits:
        raise AfpqError(f"quantization_config: bits {bits} but format {format} has {format.bits}")
    return Scheme(
        format,
        keys["group_size"] if keys.get("group_size") is not None else base.group_size,
        keys["sym"] if keys.get("sym") is not None else base.sym,
        keys["scale_dtype"] if keys.get("scale_dtype") is not None else base.scale_dtype,
    )


def config_to_json(recipe: Recipe, kept: Iterable[str]) -> dict[str, Any]:
    """Return the quantization_config of a model quantized by `recipe`; `kept` names every linear left as it was."""
    return {
        "quant_method": QUANT_METHOD,
        **scheme_to_json(recipe.scheme),
        "method": recipe.method,
        "scale_search": recipe.search,
        **options_to_json(recipe.solver_options),  # for the record: loading needs none of them
        **ends_to_json(recipe),
        "modules_to_not_convert": sorted(kept),
        "dynamic": _overrides_to_json(recipe),
    }


def ends_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a quantized embedding and head, and the lowest version that reads them right."""
    plain = recipe.embedding is None and recipe.lm_head in (None, recipe.scheme)
    schemes = {end: scheme_to_json(scheme) for end in ENDS if (scheme := getattr(recipe, end)) is not None}
    return {"version": 1 if plain else 2, **schemes}


def _overrides_to_json(recipe: Recipe) -> dict[str, Any]:
    """Return "+:regex" -> keys, with each one's rank: the first that matches wins, and Transformers sorts keys.

    Single linears, which may be thousands, have only the keys that differ from the rest.
    """
    overrides: dict[str, Any] = {}
    rest = scheme_to_json(recipe.scheme)
    for pattern, scheme in recipe.overrides:
        keys = scheme_to_json(scheme)
        if name_of(pattern) is not None:
            keys = {key: value for key, value in keys.items() if value != rest[key]}
        overrides.setdefault(f"+:{pattern}", {**keys, "rank": len(overrides)})
    return overrides


def config_from_json(keys: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """Return (recipe without its skips, modules_to_not_convert). Raises AfpqError for what this version cannot read.

    `dynamic` follows GPTQModel: `"+:regex": {keys}` overrides the scheme, `"-:regex": {}` skips.
    """
    if not isinstance(keys, dict):
        raise AfpqError(f"quantization_config: expected an object, got {keys!r}")
    if keys.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise AfpqError(f"quantization_config: method {keys['quant_method']!r} is not {QUANT_METHOD!r}")
    version = keys.get("version", VERSIONS[-1])
    if version not in VERSIONS:
        raise AfpqError(f"quantization_config: version {version!r}; this afpq reads up to {VERSIONS[-1]}. Update afpq")
    scheme = scheme_from_json(keys)
    dynamic, names = keys.get("dynamic") or {}, keys.get("modules_to_not_convert") or []
    if not isinstance(dynamic, dict) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise AfpqError("quantization_config: dynamic must be an object, modules_to_not_convert a list of names")
    for key in ("method", "scale_search"):
        if not isinstance(keys.get(key), (str, type(None))):
            raise AfpqError(f"quantization_config: {key} is {keys[key]!r}; expected a name")
    skip = [key.removeprefix("-:") for key in dynamic if key.startswith("-:")]
    positive = {key: value for key, value in dynamic.items() if not key.startswith("-:")}
    overrides = [(key.removeprefix("+:"), scheme_from_json(positive[key], scheme)) for key in _ranked(positive)]
    head, embedding = (_end_from_json(keys.get(end), scheme) for end in ENDS)
    recipe = Recipe(
        scheme,
        keys.get("method") or NEAREST,
        scale_search=keys.get("scale_search"),
        skip=tuple(skip),
        overrides=tuple(overrides),
        lm_head=head,
        embedding=embedding,
    )
    return recipe, names


def _end_from_json(value: Any, scheme: Scheme) -> Scheme | None:
    """The scheme of the head or the embedding: keys, missing ones as in the blocks; or text, as in the command line."""
    if value is None or isinstance(value, bool | str | Scheme):
        return scheme_of_end(value, scheme)
    return scheme_from_json(value, scheme)


def _ranked(overrides: dict[str, Any]) -> list[str]:
    """Their patterns by rank; those without one keep their place, behind."""

    def rank(key: str) -> int:
        value = overrides[key]
        given = value.get("rank") if isinstance(value, dict) else None
        return given if isinstance(given, int) else len(overrides)

    return sorted(overrides, key=rank)
