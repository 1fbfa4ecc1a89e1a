# SPDX-License-Identifier: MIT
"""AWQ: never worse than no scaling and no clipping, better where it should be, equal to brute force on small cases."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from afpq.algorithms.awq import SMALLEST, linear_loss, search_channel_scales, search_clips
from afpq.algorithms.rtn import quantize_rtn
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, decode, encode, extremes
from afpq.numerics.scale_search import RATIOS
from afpq.numerics.scales import fit_scales, scales_from_range
from afpq.numerics.scheme import Scheme, parse_scheme

SCHEMES = [
    "nf4-asym-g32",
    "nf3-asym-g32",
    "nf3-sym-g32",
    "int4-asym-g32",
    "int3-sym-g32",
    "fp3-asym-g-1",
    "nf2-asym-g64",
]


def problem(rows: int = 24, columns: int = 128, tokens: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails, and inputs that are correlated and have a few huge channels."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) ** 3 * 0.02
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    X = torch.randn(tokens, columns, generator=generator) @ (torch.eye(columns) + mixing) + 0.3
    X[:, torch.randperm(columns, generator=generator)[:3]] *= 30
    return W, X


def group_errors(W: Tensor, H: Tensor, scales: GroupScales, scheme: Scheme) -> Tensor:
    """e H_gg e^T of every row and group, float64."""
    span = scheme.span(W.shape[1])
    E = (W - decode(encode(W, scales, scheme), scales, scheme.format.values, span)).double()
    starts = range(0, W.shape[1], span)
    errors = [E[:, a : a + span] @ H[a : a + span, a : a + span].double() * E[:, a : a + span] for a in starts]
    return torch.stack([error.sum(1) for error in errors], 1)


# ---- channel scales


def search(W: Tensor, X: Tensor, scheme: str = "nf3-asym-g32", grid: int = 20) -> tuple[Tensor, float, float]:
    def quantize(_: int, w: Tensor) -> Tensor:
        return quantize_rtn(w, parse_scheme(scheme)).dequantize()

    found = search_channel_scales([W], X.abs().mean(0), linear_loss([W], X.T @ X), quantize, grid)
    return found.scales, found.before, found.after


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scaling_huge_channels_reduces_the_output_error(scheme: str) -> None:
    W, X = problem()
    scales, before, after = search(W, X, scheme)
    Q = [quantize_rtn(W * s, parse_scheme(scheme)).dequantize() / s for s in (torch.ones(128), scales)]
    errors = [((X @ (q - W).T) ** 2).sum().item() for q in Q]
    assert errors == pytest.approx([before, after], rel=1e-3)
    assert after < 0.8 * before
    assert scales[X.abs().mean(0) > 5].min() > scales.median()


@pytest.mark.parametrize("seed", range(5))
def test_scaling_is_never_worse(seed: int) -> None:
    W, X = problem(seed=seed)
    X = X / X.abs().mean(0) if seed % 2 else X
    scales, before, after = search(W, X)
    assert after <= before
    assert after < before or torch.equal(scales, torch.ones(128))


def test_no_scaling_is_exact_where_nothing_beats_it() -> None:
    W, X = problem()
    found = search_channel_scales([W, W], X.abs().mean(0), lambda _: 1.0, lambda _, w: w)
    assert torch.equal(found.scales, torch.ones(128))
    assert (found.before, found.after, found.alpha) == (1.0, 1.0, 0.0)
    never = search_channel_scales([W], X.abs().mean(0), lambda q: 1.0 if q[0] is W else math.nan, lambda _, w: w)
    assert torch.equal(never.scales, torch.ones(128))


def test_candidates_are_powers_of_the_magnitude_around_one() -> None:
    magnitude = torch.tensor([0.01, 0.1, 1.0, 100.0])
    seen: list[Tensor] = []

    def quantize(index: int, w: Tensor) -> Tensor:
        assert index == 0
        seen.append(w[0])
        return w

    search_channel_scales([torch.ones(2, 4)], magnitude, lambda _: 0.0, quantize, grid=4)
    assert len(seen) == 5
    for step, s in enumerate(seen):  # (0.01 * 100)^0.5 = 1
        torch.testing.assert_close(s, magnitude ** (step / 4))


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_magnitudes_that_are_no_numbers(bad: float) -> None:
    W, X = problem()
    magnitude = X.abs().mean(0)
    magnitude[7] = bad
    H = X.T @ X
    found = search_channel_scales([W], magnitude, linear_loss([W], H), lambda _, w: w.round(decimals=2))
    assert torch.isfinite(found.scales).all() and (found.scales > 0).all()
    assert found.after < found.before
    others = torch.arange(128) != 7
    extreme = found.scales[others].max() if bad == math.inf else found.scales[others].min()
    torch.testing.assert_close(found.scales[7], extreme)
    none = search_channel_scales([W], torch.full((128,), bad), linear_loss([W], H), lambda _, w: w.round(decimals=2))
    assert torch.equal(none.scales, torch.ones(128))


def test_scales_stay_within_bounds() -> None:
    seen: list[Tensor] = []
    search_channel_scales(
        [torch.ones(1, 2)], torch.tensor([1e-30, 1e30]), lambda _: 0.0, lambda _, w: seen.append(w[0]) or w
    )
    torch.testing.assert_close(torch.stack(seen)[-1], torch.tensor([SMALLEST, 1 / SMALLEST]))


def test_candidates_that_cannot_be_stored_are_passed_over() -> None:
    W, X = problem()

    def quantize(_: int, w: Tensor) -> Tensor:
        if not torch.equal(w, W):
            raise AfpqError("too large")
        return w.round(decimals=2)

    assert torch.equal(search_channel_scales([W], X.abs().mean(0), lambda _: 1.0, quantize).scales, torch.ones(128))
    with pytest.raises(AfpqError, match="NaN"):
        search(W * math.nan, X)


# ---- clips


@pytest.mark.parametrize("columns", [128, 100, 20])
@pytest.mark.parametrize("text", [*SCHEMES, "nf3-asym-g32-float32"])
def test_clips_are_never_worse_than_absmax(text: str, columns: int) -> None:
    scheme = parse_scheme(text)
    W, X = problem(columns=columns)
    H = X.T @ X
    scales, absmax = search_clips(W, H, FittedScheme(scheme)), fit_scales(W, FittedScheme(scheme))
    assert scales.pos.shape == absmax.pos.shape and scales.pos.dtype == absmax.pos.dtype
    assert (scales.neg is scales.pos) == (not scheme.two_scales) and (scales.zero is None) == (absmax.zero is None)
    found, kept = group_errors(W, H, scales, scheme), group_errors(W, H, absmax, scheme)
    assert (found <= kept * (1 + 1e-4) + 1e-6 * (W @ H * W).sum(1, keepdim=True)).all()
    assert found.sum() < 0.97 * kept.sum()
    QuantizedWeight(encode(W, scales, scheme), scales, scheme).dequantize()


@pytest.mark.parametrize("text", ["nf3-asym-g8", "nf3-sym-g8", "int3-asym-g8"])
def test_clips_equal_brute_force(text: str) -> None:
    scheme = parse_scheme(text)
    W, X = problem(rows=6, columns=20)
    H = X.T @ X
    ratios = (0.5, 0.7, 0.9, 1.0)
    low, high = extremes(W, scheme)
    pairs = product(ratios, ratios) if scheme.two_scales else zip(ratios, ratios)
    all_errors = [
        group_errors(W, H, scales_from_range(low * n, high * p, FittedScheme(scheme)), scheme) for p, n in pairs
    ]
    found = group_errors(W, H, search_clips(W, H, FittedScheme(scheme), ratios), scheme)
    torch.testing.assert_close(found, torch.stack(all_errors).amin(0), rtol=1e-4, atol=1e-6)


def test_the_best_pair_beats_the_best_of_each_side() -> None:
    """Errors of the two sides meet in the output: with correlated inputs the sides cannot be searched apart."""
    scheme = parse_scheme("nf3-asym-g32")
    W, _ = problem()
    H = torch.full((128, 128), 0.9) + 0.1 * torch.eye(128)
    apart = torch.ones(24, 4), torch.ones(24, 4)
    low, high = extremes(W, scheme)
    sides = [W.clamp(min=0), W.clamp(max=0)]
    for side, best in zip(sides, apart):
        least = torch.full((24, 4), torch.inf).double()
        for ratio in RATIOS:
            error = group_errors(side, H, scales_from_range(low * ratio, high * ratio, FittedScheme(scheme)), scheme)
            best[error < least] = ratio
            least = torch.minimum(error, least)
    alone = group_errors(W, H, scales_from_range(low * apart[1], high * apart[0], FittedScheme(scheme)), scheme)
    assert group_errors(W, H, search_clips(W, H, FittedScheme(scheme)), scheme).sum() < 0.9 * alone.sum()


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("text", SCHEMES)
def test_second_moments_that_teach_nothing_keep_absmax(text: str, value: float) -> None:
    scheme = parse_scheme(text)
    W, _ = problem()
    fitted = FittedScheme(scheme)
    scales, absmax = search_clips(W, torch.full((128, 128), value), fitted), fit_scales(W, fitted)
    assert torch.equal(scales.pos, absmax.pos) and torch.equal(scales.neg, absmax.neg)


def test_groups_without_weights_or_without_a_side() -> None:
    scheme = parse_scheme("nf4-asym-g32")
    W, X = problem()
    W[0], W[1], W[2, :32] = 0, W[1].abs(), -W[2, :32].abs()
    scales = search_clips(W, X.T @ X, FittedScheme(scheme))
    assert (scales.pos > 0).all() and (scales.neg > 0).all()
    assert (decode(encode(W, scales, scheme), scales, scheme.format.values, 32)[0] == 0).all()


def test_rows_are_searched_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = problem()
    whole = search_clips(W, X.T @ X, FittedScheme(parse_scheme("nf3-asym-g48")))
    monkeypatch.setattr("afpq.algorithms.awq.CHUNK", 5 * 96)
    chunked = search_clips(W, X.T @ X, FittedScheme(parse_scheme("nf3-asym-g48")))
    same = ((whole.pos == chunked.pos) & (whole.neg == chunked.neg)).float().mean()
    assert same > 0.99  # not equal to the bit: the order of sums may differ


def test_weights_that_are_no_numbers_are_errors() -> None:
    with pytest.raises(AfpqError, match="NaN"):
        search_clips(torch.full((2, 32), math.nan), torch.eye(32), FittedScheme(parse_scheme("nf4-asym-g32")))
