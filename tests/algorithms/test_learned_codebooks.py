# SPDX-License-Identifier: MIT
"""Learned code books: valid, never worse than nf, what Lloyd-Max says, and found again where a weight has one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.algorithms import fit_scheme, quantize_gptq, quantize_rtn
from afpq.algorithms.learned_codebooks import SAMPLE, error_of, learn_values, sample_rows, without_zero
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.formats import FORMATS, LEARNED, Format, custom_format, parse_format
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.scales import fit_scales
from afpq.numerics.scheme import Scheme, parse_scheme

LEARNED_SCHEMES = st.builds(
    Scheme,
    st.sampled_from(list(LEARNED.values())),
    st.sampled_from([-1, 7, 16, 64]),
    st.booleans(),
    st.sampled_from(["float16", "float32", "log8"]),
)
SEARCHES = st.sampled_from(["absmax", "mse"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(kind: str, *shape: int) -> Tensor:
    dice = torch.Generator().manual_seed(0)
    uniform = torch.rand(*shape, generator=dice) * 2 - 1
    return {"uniform": uniform, "laplace": -uniform.sign() * torch.log1p(-uniform.abs()), "normal": random(*shape)}[
        kind
    ]


def error(weight: Tensor, scheme: Scheme, search: str, importance: Tensor | None = None) -> float:
    h = torch.ones(weight.shape[1]) if importance is None else importance
    return error_of(quantize_rtn(weight, scheme, search, importance), weight, h)


def started(scheme: Scheme) -> Scheme:
    return replace(scheme, format=scheme.format.start)


@settings(max_examples=40)
@given(
    LEARNED_SCHEMES, SEARCHES, st.integers(1, 20), st.integers(1, 70), st.integers(0, 9),
    st.sampled_from(["normal", "one-sided", "few", "zeros"]),
)  # fmt: skip
def test_a_book_is_a_format_and_no_worse_than_its_start(
    scheme: Scheme, search: str, rows: int, columns: int, seed: int, kind: str
) -> None:
    weight, importance = random(rows, columns, seed=seed), random(columns, seed=99).square()
    weight = {"normal": weight, "one-sided": weight.abs(), "few": weight.round(), "zeros": weight * 0}[kind]
    found = fit_scheme(weight, scheme, search, importance).scheme
    book = found.format
    assert not book.learned and replace(found, format=scheme.format) == scheme
    assert parse_format(str(book)) == book and len(book.values) == len(scheme.format.values)
    assert list(book.values) == sorted(set(book.values)) and book.values[0] < 0 < book.values[-1]
    assert max(-book.values[0], book.values[-1]) == 1
    before, after = error(weight, started(scheme), search, importance), error(weight, scheme, search, importance)
    assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["laplace", "uniform", "normal"])
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("side", ["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_learned_book_beats_nf(kind: str, search: str, side: str, bits: int) -> None:
    weight, importance = drawn(kind, 64, 256), random(256, seed=1).square()
    scheme = parse_scheme(f"learned{bits}-{side}-g64")
    gain = error(weight, scheme, search, importance) / error(weight, started(scheme), search, importance)
    assert gain < (0.95 if kind == "uniform" else 0.998)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_book_a_weight_was_made_of_is_found_again(bits: int) -> None:
    book = {
        2: [-1, 0, 0.3, 1],
        3: [-1, -0.4, -0.3, 0, 0.1, 0.5, 0.7, 1],
        4: [v if abs(v) == 1 else round(v * 1.1, 3) for v in parse_format("nf4").values],
    }[bits]
    values = torch.tensor(book)
    weight = values[torch.randint(len(book), (64, 64), generator=torch.Generator().manual_seed(0))]
    weight[:, 0], weight[:, 1] = 1, -1  # so that absmax scales are those it was made with
    weight = weight * random(64, 1).exp()
    found = fit_scheme(weight, parse_scheme(f"learned{bits}-asym-g-1-float32"), "absmax").scheme
    assert found.format.values == pytest.approx(book, abs=1e-3)
    assert error(weight, found, "absmax") < 1e-6 * weight.square().sum().item()


def lloyd_max(y: np.ndarray, weight: np.ndarray, values: list[float], fixed: set[int], steps: int) -> list[float]:
    """As in a textbook: y takes the nearest value of its sign, a value moves to the mean of what took it."""
    for _ in range(steps):
        takers: list[list[int]] = [[] for _ in values]
        for i, v in enumerate(y):
            own = [k for k, c in enumerate(values) if c == 0 or (c < 0) == (v < 0)]
            takers[min(own, key=lambda k: (abs(values[k] - v), values[k]))].append(i)
        values = [
            c if k in fixed or not weight[members].sum() > 0 else float(np.average(y[members], weights=weight[members]))
            for k, (c, members) in enumerate(zip(values, takers))
        ]
    return values


@pytest.mark.parametrize("start", [parse_format("nf2"), parse_format("nf3"), without_zero(4), without_zero(8)], ids=str)
def test_values_are_those_of_a_textbooks_lloyd_max(start: Format) -> None:
    """With one scale for each row and its sign, kept: importance times the scale's square weighs a weight."""
    scheme = Scheme(start, -1, scale_dtype="float32")
    x, h = random(12, 30), random(30, seed=1).square()
    scales = fit_scales(x, FittedScheme(scheme))
    weight = QuantizedWeight(encode(x, scales, scheme), scales, scheme)
    found = learn_values(x, h, weight, fixed_scales=True, steps=5)
    s = torch.where(x < 0, scales.neg, scales.pos).double()
    fixed = {0, len(start.values) - 1} | {i for i, v in enumerate(start.values) if v == 0}
    y, importance = (x / s).flatten().numpy(), (h * s * s).flatten().numpy()
    expected = lloyd_max(y, importance, list(start.values), fixed, 5)
    assert found is not None and found.values == pytest.approx(expected, abs=6e-4)  # rounded to three decimals


def test_mirrored_groups_teach_the_same_book() -> None:
    scheme = Scheme(without_zero(8), -1, scale_dtype="float32")
    x, h = random(12, 30), torch.ones(30)
    scales = fit_scales(x, FittedScheme(scheme))
    mirrored = GroupScales(-scales.pos, -scales.neg)
    books = []
    for w, s in ((x, scales), (-x, mirrored)):
        books.append(learn_values(w, h, QuantizedWeight(encode(w, s, scheme), s, scheme), steps=4))
    assert books[0] is not None and books[0] == books[1]


def test_columns_without_importance_teach_nothing() -> None:
    weight, importance = random(32, 64), torch.ones(64)
    importance[32:] = 0
    changed = weight.clone()
    changed[:, 32:] = changed[:, 32:].sign() * 0.1
    scheme = parse_scheme("learned3-asym-g32-float32")
    books = [fit_scheme(w, scheme, "mse", importance).format for w in (weight, changed)]
    assert books[0] == books[1]


def test_a_large_weight_is_sampled_by_rows_the_same_each_time() -> None:
    weight = random(4096, 256)
    sample = sample_rows(weight)
    assert sample.shape == (SAMPLE // 256, 256) and torch.equal(sample, sample_rows(weight))
    places = [int((weight == row).all(1).nonzero()) for row in sample[:20]]
    assert places == sorted(places) and places != list(range(20))
    assert sample_rows(random(200, 256)).shape == (200, 256)
    assert len(sample_rows(torch.empty(40, 2**16))) == 16


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_what_a_sample_teaches_holds_for_all(search: str) -> None:
    weight, scheme = drawn("laplace", 3000, 128), parse_scheme("learned3-asym-g64-log8")
    assert len(sample_rows(weight)) < len(weight) / 2
    assert error(weight, scheme, search) < error(weight, started(scheme), search)


def test_an_ordinary_format_is_left_alone() -> None:
    for format in FORMATS.values():
        scheme = Scheme(format, 32)
        assert fit_scheme(random(4, 32), scheme) == FittedScheme(scheme)


def test_where_nothing_is_better_nf_stays_by_its_name() -> None:
    assert fit_scheme(torch.zeros(4, 32), parse_scheme("learned3-asym-g32")).format == parse_format("nf3")


def test_nan_is_an_error() -> None:
    weight = random(4, 32)
    weight[2, 3] = torch.nan
    with pytest.raises(AfpqError, match="NaN"):
        quantize_rtn(weight, parse_scheme("learned3-asym-g32"))


@pytest.mark.parametrize("text", ["learned3-asym-g32-log8", "learned2-sym-g16", "learned4-asym-g-1"])
def test_gptq_learns_from_what_it_is_given(text: str) -> None:
    x = random(256, 96) @ random(96, 96, seed=1)
    H, weight = x.T @ x, random(48, 96, seed=2)
    solved, _ = quantize_gptq(weight, H, parse_scheme(text))
    assert solved.scheme.format == fit_scheme(weight, parse_scheme(text), "mse", H.diagonal()).format
    plain, _ = quantize_gptq(weight, H, started(parse_scheme(text)))

    def loss(q: QuantizedWeight) -> float:
        e = q.dequantize() - weight
        return float(((e @ H) * e).sum())

    assert loss(solved) < 1.1 * loss(plain)  # near it; on average below


def test_the_start_without_zero_is_in_order() -> None:
    for count in (4, 8, 16):
        values = without_zero(count).values
        assert len(values) == count and values == tuple(-v for v in reversed(values)) and 0 not in values
    assert custom_format(without_zero(4).values).values == (-1.0, -0.3, 0.3, 1.0)
