# SPDX-License-Identifier: MIT
"""The saved configuration means what the recipe meant, and nonsense in it is an AfpqError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq import AfpqConfig
from afpq.algorithms.methods import METHODS
from afpq.checkpoint.quantization_config import config_from_json, config_to_json, scheme_from_json, scheme_to_json
from afpq.errors import AfpqError
from afpq.numerics.formats import FORMATS, custom_format
from afpq.numerics.scheme import DEFAULT_SCHEME, Scheme, parse_scheme
from afpq.recipe import Recipe, is_kept

NF4, NF3, INT8 = parse_scheme("nf4-asym-g128"), parse_scheme("nf3-asym-g64"), parse_scheme("int8-sym-g-1")
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]

SCHEMES = st.builds(
    Scheme,
    st.sampled_from([*FORMATS.values(), custom_format([-1, -0.3, 0, 0.1, 1])]),
    st.sampled_from([-1, 1, 64, 128]),
    st.booleans(),
    st.sampled_from(["float16", "float32", "log8"]),
)
PATTERNS = st.sampled_from(["q_proj", "mlp", r"layers\.1\.", r"layers\.(0|1)\.self_attn", "proj$", "^lm_head$", "."])
RECIPES = st.builds(
    Recipe,
    SCHEMES,
    method=st.sampled_from(sorted(METHODS)),
    scale_search=st.sampled_from(["absmax", "mse"]),
    overrides=st.lists(st.tuples(PATTERNS, SCHEMES), max_size=4).map(tuple),
)


def read_back(recipe: Recipe, kept: list[str], **dump: Any) -> tuple[Recipe, list[str]]:
    return config_from_json(json.loads(json.dumps(config_to_json(recipe, kept), **dump)))


@settings(deadline=None)
@given(SCHEMES)
def test_schemes_round_trip(scheme: Scheme) -> None:
    assert scheme_from_json(json.loads(json.dumps(scheme_to_json(scheme)))) == scheme


@settings(deadline=None)
@given(RECIPES, st.lists(st.sampled_from(NAMES), unique=True))
def test_a_saved_recipe_means_the_same(recipe: Recipe, kept: list[str]) -> None:
    """To every module; `kept` is how skips are saved."""
    back, names = read_back(recipe, kept)
    assert (back.scheme, back.method, back.search) == (recipe.scheme, recipe.method, recipe.search)
    assert sorted(names) == sorted(kept)
    assert [back.scheme_for(name) for name in NAMES] == [recipe.scheme_for(name) for name in NAMES]


def test_the_order_of_overrides_survives_sorted_keys() -> None:
    """Transformers sorts the keys of config.json when it saves a model again."""
    recipe = Recipe(NF4, overrides=(("q_proj", INT8), ("mlp", NF3), ("layers", parse_scheme("nf2-asym-g64"))))
    back, _ = read_back(recipe, [], sort_keys=True)
    assert [back.scheme_for(name) for name in NAMES] == [recipe.scheme_for(name) for name in NAMES]


def test_of_two_overrides_with_one_pattern_the_first_is_saved() -> None:
    back, _ = read_back(Recipe(NF4, overrides=(("q_proj", INT8), ("q_proj", NF3))), [])
    assert back.scheme_for(NAMES[0]) == INT8


def test_saving_twice_changes_nothing() -> None:
    recipe = Recipe(NF4, overrides=(("q_proj", INT8), ("mlp", NF3)))
    saved = config_to_json(recipe, ["lm_head"])
    assert config_to_json(*config_from_json(saved)) == saved


def test_the_fields_names_are_used() -> None:
    saved = config_to_json(Recipe(NF3, overrides=(("q_proj", INT8),)), ["b", "a"])
    expected = {
        "quant_method": "afpq",
        "version": 1,
        "bits": 3,
        "format": "nf3",
        "group_size": 64,
        "sym": False,
        "scale_dtype": "float16",
        "method": "rtn",
        "modules_to_not_convert": ["a", "b"],
    }
    assert saved.items() >= expected.items()
    assert all(isinstance(keys, dict) and keys["format"] == "int8" for keys in saved["dynamic"].values())


@pytest.mark.parametrize(
    ("keys", "scheme"),
    [
        ({}, "nf4-asym-g64-log8"),
        ({"bits": 3}, "nf3-asym-g64-log8"),
        ({"bits": 8}, "int8-asym-g64-log8"),
        ({"format": "fp3"}, "fp3-asym-g64-log8"),
        ({"format": "int4", "bits": 4, "sym": True, "group_size": -1}, "int4-sym-g-1-log8"),
        ({"bits": None, "format": None, "group_size": None, "sym": None, "scale_dtype": None}, "nf4-asym-g64-log8"),
        ({"scale_dtype": "float32"}, "nf4-asym-g64-float32"),
        ({"format": "lut:-1:0:1", "bits": 2}, "lut:-1.0:0.0:1.0-asym-g64-log8"),
    ],
    ids=str,
)
def test_missing_keys_have_defaults(keys: dict[str, Any], scheme: str) -> None:
    assert scheme_from_json(keys) == parse_scheme(scheme)
    recipe, kept = config_from_json(keys)
    assert recipe == Recipe(parse_scheme(scheme)) and kept == []


def test_dynamic_follows_gptqmodel() -> None:
    """`+:` or nothing overrides the keys given and inherits the others; `-:` skips."""
    dynamic: dict[str, Any] = {
        r"+:q_proj": {"bits": 8},
        r"k_proj": {"group_size": 32},
        r"+:v_proj": {"format": "nf3", "sym": False},
        r"-:down_proj": {},
    }
    rest = {"format": "nf4", "group_size": 64, "sym": True, "scale_dtype": "float16"}
    recipe, _ = config_from_json({**rest, "dynamic": dynamic})
    found = {name: recipe.scheme_for(f"model.layers.0.{name}") for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert {name: str(scheme) for name, scheme in found.items()} == {
        "q_proj": "int8-sym-g64",
        "k_proj": "nf4-sym-g32",
        "v_proj": "nf3-asym-g64",
        "o_proj": "nf4-sym-g64",
    }
    assert recipe.scheme_for("model.layers.0.mlp.down_proj") is None


@pytest.mark.parametrize("version", [0, 3, 1.5, "1", "latest"], ids=repr)
def test_another_version_is_an_error(version: object) -> None:
    with pytest.raises(AfpqError, match="version"):
        config_from_json({"version": version})


def test_another_methods_config_is_an_error() -> None:
    with pytest.raises(AfpqError, match="gptq"):
        config_from_json({"quant_method": "gptq", "bits": 4})


@pytest.mark.parametrize(("bits", "format"), [(4, "nf3"), (3, "int4"), (8, "fp4"), (4, "lut:-1:0:1")])
def test_bits_that_contradict_the_format_are_an_error(bits: int, format: str) -> None:
    with pytest.raises(AfpqError, match=f"bits {bits}"):
        config_from_json({"bits": bits, "format": format})


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": "4"}, {"bits": 4.0}, {"bits": True}, {"bits": 0}, {"bits": 5}, {"bits": -4}, {"bits": [4]},
        {"format": 4}, {"format": ["nf4"]}, {"format": "nf9"}, {"format": ""}, {"format": False},
        {"group_size": "128"}, {"group_size": 128.0}, {"group_size": True}, {"group_size": 0}, {"group_size": -2},
        {"sym": 1}, {"sym": "true"}, {"sym": 0},
        {"scale_dtype": "bfloat16"}, {"scale_dtype": 16}, {"scale_dtype": ""},
        {"method": "magic"}, {"method": 5}, {"method": ["rtn"]}, {"method": {}},
        {"scale_search": "best"}, {"scale_search": 5}, {"scale_search": ["mse"]}, {"scale_search": {"a": 1}},
        {"modules_to_not_convert": "lm_head"}, {"modules_to_not_convert": [1]}, {"modules_to_not_convert": {"a": 1}},
        {"dynamic": ["q_proj"]}, {"dynamic": "q_proj"},
        {"dynamic": {"+:q_proj": 4}}, {"dynamic": {"+:q_proj": None}}, {"dynamic": {"+:q_proj": "nf3"}},
        {"dynamic": {"+:q_proj": [["bits", 3]]}}, {"dynamic": {"+:q_proj": {"bits": "3"}}},
        {"dynamic": {"+:q_proj": {"bits": 3, "format": "nf4"}}}, {"dynamic": {"+:(": {"bits": 3}}},
        {"dynamic": {"-:(": {}}},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_errors(keys: dict[str, Any]) -> None:
    with pytest.raises(AfpqError):
        config_from_json(keys)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("lm_head", "lm_head"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),  # the whole name
        ("model.layers.1.mlp.up_proj", "model.layers.1"),  # a parent
        ("model.layers.1.mlp.up_proj", "up_proj"),  # the last part
        ("model.layers.1.mlp.up_proj", "mlp.up_proj"),  # the last parts
        ("model.layers.1.mlp.up_proj", r".*\.up_proj"),  # a pattern
        ("model.layers.1.mlp.up_proj", r"model\.layers\.\d+\.mlp\..*"),
        ("layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),  # saved with the base model's prefix
    ],
)
def test_what_is_kept(name: str, entry: str) -> None:
    assert is_kept(name, [entry])
    assert is_kept(name, ["other", entry])


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("model.layers.10.mlp.up_proj", "model.layers.1"),  # layer 10 is not in layer 1
        ("model.layers.1.mlp.up_proj", "model.layers.10"),
        ("model.layers.1.mlp.up_proj", "p_proj"),  # half a name
        ("model.layers.1.mlp.up_proj", "layers.1"),  # neither first nor last
        ("model.layers.1.mlp.up_proj", "up_proj_extra"),
        ("model.layers.1.mlp.up_proj", r"up_proj.*"),  # a pattern covers the whole name
        ("model.layers.1.mlp.up_proj", "("),  # no pattern at all
        ("model.layers.1.mlp.up_proj", ""),
        ("lm_head", "lm_head.weight"),
    ],
)
def test_what_is_not_kept(name: str, entry: str) -> None:
    assert not is_kept(name, [entry])
    assert not is_kept(name, [])


@pytest.mark.parametrize(
    "keys", [{}, {"bits": 3}, {"format": "nf4", "sym": True}, {"group_size": 32}, {"sym": None}], ids=str
)
def test_what_is_left_out_is_the_same_for_every_reader(keys: dict[str, Any]) -> None:
    """The command's default scheme, for `info`, `export` and `from_pretrained` alike."""
    scheme, default = config_from_json(keys)[0].scheme, parse_scheme(DEFAULT_SCHEME)
    assert AfpqConfig(**keys).recipe()[0].scheme == scheme
    assert AfpqConfig(**keys).to_dict() == AfpqConfig(**AfpqConfig(**keys).to_dict()).to_dict()
    assert scheme.group_size == (keys.get("group_size") or default.group_size)
    assert (scheme.scale_dtype, scheme.sym) == (default.scale_dtype, bool(keys.get("sym")))


def test_a_written_config_names_every_key_of_its_scheme() -> None:
    """So a default may change without a change of any model that was written."""
    keys = config_to_json(Recipe(parse_scheme("nf3-asym-g128")), ())
    assert {"bits", "format", "group_size", "sym", "scale_dtype", "method", "scale_search"} <= set(keys)
