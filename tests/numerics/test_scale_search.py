# SPDX-License-Identifier: MIT
"""Searched scales are never worse than absmax, near the best that brute force finds, and heed the importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.formats import FORMATS, custom_format
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.scale_search import find_scales, search_scales
from afpq.numerics.scales import fit_scales
from afpq.numerics.scheme import Scheme, parse_scheme

numeric = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
BOOKS = [*FORMATS.values(), custom_format([-1, -0.5, 0.1, 1])]  # the last has no zero
SCHEMES = st.builds(
    Scheme,
    st.sampled_from(BOOKS),
    st.sampled_from([-1, 1, 3, 8]),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
)
KINDS = ["nf4-asym", "fp3-asym", "nf3-sym", "int4-asym", "int3-sym"]  # two scales, one scale, zero point, integer


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Up to 3 x 20 floats, some exact zeros and repeated values, some rows of one sign."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    unit = st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.25]))
    data = []
    for _ in range(rows):
        magnitude, sign = draw(st.sampled_from([1e-6, 1.0, 6e4])), draw(st.sampled_from([0, 1, -1]))
        row = draw(st.lists(unit, min_size=columns, max_size=columns))
        data.append([magnitude * (sign * abs(v) if sign else v) for v in row])
    return torch.tensor(data, dtype=torch.float32)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group_errors(weight: Tensor, scales: GroupScales, scheme: Scheme, importance: Tensor | None = None) -> Floats:
    """Squared error of every group and, where each has its scale, of every side: [rows, groups, sides]."""
    back = QuantizedWeight(encode(weight, scales, scheme), scales, scheme).dequantize()
    return group_sums((back - weight).double().square(), weight, scheme, importance)


def group_sums(terms: Tensor, weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Floats:
    terms = terms if importance is None else terms * importance.double()
    sides = [weight >= 0, weight < 0] if scheme.two_scales else [torch.ones_like(weight, dtype=torch.bool)]
    parts = [(terms * side).split(scheme.span(weight.shape[1]), 1) for side in sides]
    return torch.stack([torch.stack([part.sum(1) for part in side], 1) for side in parts], -1).numpy()


def assert_not_worse(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> None:
    """To 1e-5, and to a float32 rounding of the weights: a tie may be told apart from its neighbour differently."""
    ours, theirs = search_scales(weight, FittedScheme(scheme), importance), fit_scales(weight, FittedScheme(scheme))
    for one, other in ((ours.pos, theirs.pos), (ours.neg, theirs.neg)):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert bool((one != 0).all()) and bool(torch.isfinite(one).all())
    assert torch.equal(ours.pos < 0, ours.neg < 0)  # a mirrored book is mirrored on both sides
    assert (ours.zero is None) == (theirs.zero is None)
    assert scheme.two_scales or torch.equal(ours.pos, ours.neg)
    searched, absmax = (group_errors(weight, scales, scheme, importance).sum(-1) for scales in (ours, theirs))
    rounding = 1e-8 * group_sums(weight.double().square(), weight, scheme, importance).sum(-1)
    assert (searched <= absmax * (1 + 1e-5) + rounding + 1e-30).all()


@numeric
@given(matrices(), SCHEMES)
def test_no_group_is_worse_than_with_absmax(weight: Tensor, scheme: Scheme) -> None:
    assert_not_worse(weight, scheme)


@numeric
@given(matrices(), SCHEMES, st.data())
def test_nor_is_it_when_columns_are_weighed(weight: Tensor, scheme: Scheme, data: st.DataObject) -> None:
    columns = data.draw(
        st.lists(st.floats(2**-13, 2**13, width=32), min_size=weight.shape[1], max_size=weight.shape[1])
    )
    assert_not_worse(weight, scheme, torch.tensor(columns))


@pytest.mark.parametrize("side", ["asym", "sym"])
def test_exact_zeros_in_a_book_without_zero(side: str) -> None:
    """They take the smallest value above, for the search as for the rounding."""
    weight = gaussian(16, 32)
    weight[:, ::3] = 0
    assert_not_worse(weight, parse_scheme(f"lut:-1:-0.5:0.1:1-{side}-g8"))


@pytest.mark.parametrize("kind", KINDS)
def test_large_groups_gain(kind: str) -> None:
    weight = gaussian(64, 256)
    scheme = parse_scheme(f"{kind}-g128")
    assert_not_worse(weight, scheme)
    searched = group_errors(weight, search_scales(weight, FittedScheme(scheme)), scheme).sum()
    assert searched < 0.95 * group_errors(weight, fit_scales(weight, FittedScheme(scheme)), scheme).sum()


@numeric
@given(matrices(), SCHEMES)
def test_a_mirrored_weight_costs_the_same(weight: Tensor, scheme: Scheme) -> None:
    """The book may be mirrored too, so a weight and its negative are equally hard (zero points are searched once)."""
    if scheme.zero_point or (not scheme.format.has_zero and bool((weight == 0).any())):
        return  # without a zero in the book, 0 belongs to the positive side
    errors = [group_errors(w, search_scales(w, FittedScheme(scheme)), scheme).sum(-1) for w in (weight, -weight)]
    rounding = 1e-7 * group_sums(weight.double().square(), weight, scheme).sum(-1)
    assert (abs(errors[0] - errors[1]) <= 1e-4 * errors[0] + rounding + 1e-30).all()


@pytest.mark.parametrize("kind", ["nf4-asym", "nf3-sym", "int3-sym"])
def test_mirroring_helps_books_with_more_values_on_one_side(kind: str) -> None:
    weight, scheme = gaussian(64, 256), parse_scheme(f"{kind}-g64")
    scales = search_scales(weight, FittedScheme(scheme))
    assert 0.2 < (scales.pos < 0).float().mean() < 0.8
    turned = torch.where(scales.pos < 0, -1.0, 1.0).repeat_interleave(64, 1)
    again = search_scales(
        weight * turned, FittedScheme(scheme)
    )  # each group the way it prefers: nothing left to mirror
    assert not bool((again.pos < 0).any())


# --- brute force


def grid_errors(w: Floats, levels: Floats, scales: Floats) -> Floats:
    """Least squared error of the weights for every scale, each weight taking its nearest level."""
    distance: Floats = np.abs(w[:, None] - scales[:, None, None] * levels).min(-1)
    return np.asarray(np.square(distance).sum(-1))


def best_error(w: Floats, scheme: Scheme) -> float:
    """The least squared error over a fine grid of scales, and over all zero points."""
    book = np.array(scheme.format.values)
    low, high = max(-w.min(), 0), max(w.max(), 0)
    ratios = np.linspace(0.3, 1.3, 200)
    if scheme.two_scales:
        above, below = ratios * high / book[-1], ratios * low / -book[0]
        return float(grid_errors(w[w >= 0], book, above).min() + grid_errors(w[w < 0], book, below).min())
    if scheme.zero_point:
        scales = ratios * (low + high) / (book[-1] - book[0])
        return float(min(grid_errors(w, book - zero, scales).min() for zero in book))
    return float(grid_errors(w, book, ratios * max(low / -book[0], high / book[-1])).min())


@pytest.mark.parametrize("length", [32, 128])
@pytest.mark.parametrize("side", ["asym", "sym"])
@pytest.mark.parametrize("format", ["nf4", "nf3", "nf2", "fp4", "fp3", "int4", "int3"])
def test_within_two_percent_of_brute_force_on_average(format: str, side: str, length: int) -> None:
    scheme = parse_scheme(f"{format}-{side}-g-1-float32")
    weight = gaussian(16, length, seed=length)
    searched = group_errors(weight, search_scales(weight, FittedScheme(scheme)), scheme).sum(-1)[:, 0]
    best = np.array([best_error(w, scheme) for w in weight.double().numpy()])
    assert (searched / best).mean() <= 1.02


# --- importance


@pytest.mark.parametrize("kind", KINDS)
def test_columns_without_importance_do_not_count(kind: str) -> None:
    weight, scheme = gaussian(32, 64), parse_scheme(f"{kind}-g32")
    importance = gaussian(64, seed=1).square() + 0.1
    importance[5::7] = 0
    errors = []
    for factor in (0.0, -0.1, 0.5, 1.0):  # an outlier would stretch the range that is searched, on purpose: see RATIOS
        other = torch.where(importance == 0, weight * factor, weight)
        errors.append(
            group_errors(other, search_scales(other, FittedScheme(scheme), importance), scheme, importance).sum()
        )
    assert errors == pytest.approx([errors[0]] * len(errors), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_moves_the_error_to_where_it_matters_less(kind: str) -> None:
    weight, scheme = gaussian(32, 64), parse_scheme(f"{kind}-g64")
    importance = gaussian(64, seed=1) ** 4
    weighed = group_errors(weight, search_scales(weight, FittedScheme(scheme), importance), scheme, importance)
    plain = group_errors(weight, search_scales(weight, FittedScheme(scheme)), scheme, importance)
    assert weighed.sum() < 0.99 * plain.sum()


@settings(numeric, max_examples=20)
@given(matrices(), SCHEMES, st.integers(-60, 60))
def test_only_ratios_of_importance_matter(weight: Tensor, scheme: Scheme, exponent: int) -> None:
    importance = torch.linspace(0.5, 2, weight.shape[1])
    once, scaled = (search_scales(weight, FittedScheme(scheme), importance * factor) for factor in (1.0, 2.0**exponent))
    assert torch.equal(once.pos, scaled.pos) and torch.equal(once.neg, scaled.neg)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_importance_is_none(kind: str) -> None:
    weight, scheme = gaussian(8, 20), parse_scheme(f"{kind}-g8")
    plain, equal = (
        search_scales(weight, FittedScheme(scheme)),
        search_scales(weight, FittedScheme(scheme), torch.full((20,), 4.0)),
    )
    assert torch.equal(plain.pos, equal.pos) and torch.equal(plain.neg, equal.neg)


@pytest.mark.parametrize("kind", KINDS)
def test_no_importance_anywhere_is_no_error(kind: str) -> None:
    weight, scheme = gaussian(4, 20), parse_scheme(f"{kind}-g8")
    scales = search_scales(weight, FittedScheme(scheme), torch.zeros(20))
    assert bool(torch.isfinite(scales.pos).all()) and bool((scales.pos > 0).all())


# --- groups


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_do_not_see_each_other(kind: str, weighed: bool) -> None:
    """Nor rows, and a short last group is a group like the others."""
    weight, scheme, span = gaussian(3, 20), parse_scheme(f"{kind}-g8"), 8
    columns = torch.linspace(0.5, 2, 20) if weighed else None
    whole = search_scales(weight, FittedScheme(scheme), columns)
    for row, line in enumerate(weight):
        for index, part in enumerate(line.split(span)):
            own = None if columns is None else columns.split(span)[index]
            alone = search_scales(part[None], FittedScheme(scheme), own)
            assert torch.equal(alone.pos[0, 0], whole.pos[row, index])
            assert torch.equal(alone.neg[0, 0], whole.neg[row, index])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_absmax_accepts_is_accepted(kind: str, sign: int) -> None:
    """Up to the largest float16 scale: a candidate that is larger still is no reason to give up."""
    scheme = parse_scheme(f"{kind}-g4")
    weight = gaussian(2, 8)
    weight[0, 1] = sign * 65504 * min(scheme.format.values[-1], -scheme.format.values[0])
    assert_not_worse(weight, scheme)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e7])
def test_what_absmax_refuses_is_refused(bad: float) -> None:
    weight = gaussian(3, 9)
    weight[1, 8] = bad
    with pytest.raises(AfpqError):
        search_scales(weight, FittedScheme(parse_scheme("nf4-asym-g4")))


def test_scales_are_found_by_the_search_that_is_named() -> None:
    weight, fitted, importance = gaussian(4, 32), FittedScheme(parse_scheme("nf3-asym-g8")), gaussian(32).square()
    assert torch.equal(find_scales(weight, fitted, "absmax", importance).pos, fit_scales(weight, fitted).pos)
    searched = find_scales(weight, fitted, "mse", importance)
    assert torch.equal(searched.pos, search_scales(weight, fitted, importance).pos)
    assert not torch.equal(searched.pos, find_scales(weight, fitted, "mse").pos)
    with pytest.raises(AfpqError, match="'best'"):
        find_scales(weight, fitted, "best")
