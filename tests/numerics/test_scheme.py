# SPDX-License-Identifier: MIT
"""Schemes survive the trip through text; a recipe says which scheme each module gets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq.errors import AfpqError
from afpq.numerics.formats import FORMATS, Format, custom_format, parse_format
from afpq.numerics.scale_storage import SCALE_STORAGES
from afpq.numerics.scheme import Scheme, default_format, parse_scheme
from afpq.recipe import Recipe

FLOATS = st.floats(-1e6, 1e6, width=32)
BOOKS = st.lists(FLOATS, min_size=2, max_size=16, unique=True).filter(lambda v: min(v) < 0 < max(v))
ANY_FORMAT = st.one_of(st.sampled_from(list(FORMATS.values())), BOOKS.map(custom_format))
GROUP_SIZES = st.one_of(st.just(-1), st.integers(1, 10**6))

Q, K, MLP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.10.mlp.up_proj"
NF4, NF3, INT8 = parse_scheme("nf4-asym-g128"), parse_scheme("nf3-asym-g64"), parse_scheme("int8-sym-g-1")


@settings(deadline=None)
@given(ANY_FORMAT, GROUP_SIZES, st.booleans(), st.sampled_from(["float16", "float32"]))
def test_schemes_round_trip(format: Format, group_size: int, sym: bool, scale_dtype: str) -> None:
    scheme = Scheme(format, group_size, sym, scale_dtype)
    assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize("group_size", [-1, 1, 64, 128])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_scheme_text_form(name: str, sym: bool, group_size: int) -> None:
    scheme = Scheme(parse_format(name), group_size, sym)
    assert str(scheme) == f"{name}-{'sym' if sym else 'asym'}-g{group_size}"
    assert str(Scheme(scheme.format, group_size, sym, "float32")) == f"{scheme}-float32"
    assert parse_scheme(f"{scheme}-float16") == scheme


@pytest.mark.parametrize(
    "text",
    [
        "", "nf4", "nf4-asym", "nf4-g128", "asym-g128", "nf4-both-g128", "nf4-asym-128", "nf4-asym-g", "nf4-asym-g0",
        "nf4-asym-g-2", "nf4-asym-g1.5", "nf4-asym-g128-float64", "nf4-asym-g128-bfloat16", "nf9-asym-g128",
        "nf4-asym-g128 ", "lut:1:2-sym-g64", "nf4_asym_g128",
    ],
)  # fmt: skip
def test_what_is_no_scheme_is_an_error(text: str) -> None:
    with pytest.raises(AfpqError):
        parse_scheme(text)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_impossible_group_sizes_are_errors(group_size: int) -> None:
    with pytest.raises(AfpqError, match="group size"):
        Scheme(parse_format("nf4"), group_size)


def test_unknown_scale_dtype_is_an_error() -> None:
    with pytest.raises(AfpqError, match="bfloat16"):
        Scheme(parse_format("nf4"), 128, scale_dtype="bfloat16")


def test_asymmetric_means_two_scales_except_for_integers() -> None:
    kinds = {text: (parse_scheme(text).two_scales, parse_scheme(text).zero_point) for text in _FOUR_KINDS}
    assert kinds == _FOUR_KINDS


_FOUR_KINDS = {
    "nf4-asym-g8": (True, False),
    "nf4-sym-g8": (False, False),
    "int4-asym-g8": (False, True),
    "int4-sym-g8": (False, False),
}


@settings(deadline=None)
@given(GROUP_SIZES, st.integers(1, 10**5))
def test_groups_of_one_span_cover_a_row(group_size: int, in_features: int) -> None:
    scheme = Scheme(parse_format("nf4"), group_size)
    groups, span = scheme.groups(in_features), scheme.span(in_features)
    assert (groups - 1) * span < in_features <= groups * span
    assert span == (in_features if group_size == -1 else min(group_size, in_features))


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups", "span"),
    [
        (128, 512, 4, 128),
        (128, 513, 5, 128),  # the last group holds one weight
        (128, 127, 1, 127),  # larger than the row
        (-1, 513, 1, 513),
        (1, 3, 3, 1),
    ],
)
def test_groups_and_span_by_hand(group_size: int, in_features: int, groups: int, span: int) -> None:
    scheme = Scheme(parse_format("nf4"), group_size)
    assert (scheme.groups(in_features), scheme.span(in_features)) == (groups, span)


def test_a_recipe_without_patterns_gives_every_module_its_scheme() -> None:
    assert all(Recipe(NF4).scheme_for(name) == NF4 for name in (Q, K, MLP))


def test_skip_leaves_out_what_matches_anywhere_in_the_name() -> None:
    recipe = Recipe(NF4, skip=("k_proj", r"layers\.1\."))
    assert recipe.scheme_for(Q) == NF4
    assert recipe.scheme_for(K) is None
    assert recipe.scheme_for(MLP) == NF4  # layer 10 is not layer 1
    assert recipe.scheme_for("model.layers.1.mlp.up_proj") is None


def test_the_first_matching_override_wins() -> None:
    recipe = Recipe(NF4, overrides=(("q_proj", INT8), ("self_attn", NF3)))
    assert recipe.scheme_for(Q) == INT8
    assert recipe.scheme_for(K) == NF3
    assert recipe.scheme_for(MLP) == NF4


def test_skip_beats_override() -> None:
    recipe = Recipe(NF4, skip=("q_proj$",), overrides=(("self_attn", NF3),))
    assert recipe.scheme_for(Q) is None
    assert recipe.scheme_for(K) == NF3


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"scale_search": "best"}, {"skip": ("(",)}, {"overrides": (("[", NF4),)}],
    ids=str,
)
def test_wrong_recipes_are_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(AfpqError):
        Recipe(NF4, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCALE_STORAGES)
def test_every_storage_has_a_text_form(name: str) -> None:
    scheme = Scheme(parse_format("nf4"), 32, scale_dtype=name)
    assert parse_scheme(str(scheme)) == scheme and scheme.storage is SCALE_STORAGES[name]
    assert str(scheme) == ("nf4-asym-g32" if name == "float16" else f"nf4-asym-g32-{name}")


def test_default_formats_are_normal_floats_where_there_is_one() -> None:
    assert [str(default_format(bits)) for bits in (2, 3, 4, 8)] == ["nf2", "nf3", "nf4", "int8"]
    for bits in (0, 1, 5, 16):
        with pytest.raises(AfpqError):
            default_format(bits)
