# SPDX-License-Identifier: MIT
"""Code books hold the values they claim, and formats survive the trip through their text form."""

from __future__ import annotations

from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afpq.errors import AfpqError
from afpq.numerics.formats import (
    BITS,
    FORMATS,
    INTEGERS,
    LEARNED,
    NORMAL_FLOATS,
    Format,
    custom_format,
    parse_format,
    repeated_codebook_bytes,
)

FLOATS = st.floats(-1e6, 1e6, width=32)
BOOKS = st.lists(FLOATS, min_size=2, max_size=40, unique=True).filter(lambda v: min(v) < 0 < max(v))


def linspace(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def normal_float(bits: int) -> list[float]:
    """QLoRA's construction: quantiles of the normal distribution, one more above zero than below, largest 1."""
    offset = ((1 - 1 / (2 * (2**bits - 1))) + (1 - 1 / (2 * 2**bits))) / 2
    quantile, half = NormalDist().inv_cdf, 2 ** (bits - 1)
    above = [quantile(p) for p in linspace(offset, 0.5, half + 1)[:-1]]
    below = [-quantile(p) for p in linspace(offset, 0.5, half)[:-1]]
    return sorted(v / max(above) for v in [*below, 0.0, *above])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_are_quantiles_of_the_normal_distribution(bits: int) -> None:
    book = parse_format(f"nf{bits}")
    assert book.values == pytest.approx(normal_float(bits), abs=1e-6)
    assert len(book.values) == 2**bits and book.values[0] == -1 and book.values[-1] == 1


def test_nf4_and_nf3_are_the_papers_to_the_last_digit() -> None:
    assert parse_format("nf4").values == (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
    assert parse_format("nf3").values == (
        -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
        0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "exponent_bits", "mantissa_bits"), [("fp4", 2, 1), ("fp3", 2, 0)])
def test_floats_are_every_number_of_their_exponent_and_mantissa(
    name: str, exponent_bits: int, mantissa_bits: int
) -> None:
    steps = 2**mantissa_bits
    subnormal = [m / steps for m in range(steps)]  # exponent field 0, bias 1
    normal = [2.0 ** (e - 1) * (1 + m / steps) for e in range(1, 2**exponent_bits) for m in range(steps)]
    magnitudes = [*subnormal, *normal]
    assert list(parse_format(name).values) == sorted({*magnitudes, *(-m for m in magnitudes)})


def test_small_floats_by_hand() -> None:
    assert parse_format("fp4").values == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert parse_format("fp3").values == (-4, -2, -1, 0, 1, 2, 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_twos_complement(bits: int) -> None:
    book = parse_format(f"int{bits}")
    assert book.values == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert book.integer and book.bits == bits


def test_only_integers_are_integer() -> None:
    assert {name for name, book in FORMATS.items() if book.integer} == {"int2", "int3", "int4", "int8"}


@pytest.mark.parametrize("name", FORMATS)
def test_known_formats_round_trip_and_have_zero_and_the_bits_of_their_name(name: str) -> None:
    book = parse_format(name)
    assert str(book) == name and parse_format(str(book)) == book
    assert book.has_zero
    assert book.bits == int(name[-1])
    assert list(book.values) == sorted(set(book.values))


@settings(deadline=None)
@given(BOOKS)
def test_custom_formats_round_trip_exactly(values: list[float]) -> None:
    book = custom_format(values)
    assert parse_format(str(book)) == book
    assert list(book.values) == sorted(values)
    assert book.has_zero == (0.0 in values)
    assert not book.integer


def test_custom_format_by_name() -> None:
    assert parse_format("lut:0.4:-1:1:0:-0.3").values == (-1.0, -0.3, 0.0, 0.4, 1.0)


@pytest.mark.parametrize(
    ("count", "bits"), [(2, 2), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 8), (256, 8)]
)
def test_bits_are_the_fewest_that_count_the_values(count: int, bits: int) -> None:
    assert custom_format([-1.0, *map(float, range(1, count))]).bits == bits


@pytest.mark.parametrize("name", ["", "nf5", "NF4", "int16", "nf4 ", "lut", "lut:", "lut:a:b", "lut:-1::1"])
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(AfpqError):
        parse_format(name)


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AfpqError, match=r"nf9.*nf4.*fp3.*int8.*lut:"):
        parse_format("nf9")


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [-1.0, 0.0],
        [0.0, 1.0],
        [1.0, 2.0],
        [-1.0, 1.0, 1.0],
        [-1.0, 0.0, -0.0, 1.0],
        [-1.0, float("nan"), 1.0],
        [float("nan"), -1.0, 1.0],
        [-1.0, 1.0, float("inf")],
        [-float("inf"), 1.0],
        [-1.0, 1e39],  # the arithmetic is float32, where this is infinite,
        [-1e-50, 1.0],  # this is zero,
        [-1.0, 1.0, 1.0 + 1e-12],  # and these are equal
        [float(i) for i in range(-128, 129)],
    ],
    ids=str,
)
def test_impossible_books_are_errors(values: list[float]) -> None:
    with pytest.raises(AfpqError):
        custom_format(values)
    with pytest.raises(AfpqError):
        parse_format("lut:" + ":".join(map(str, values)))


def test_a_format_does_not_sort_for_you() -> None:
    with pytest.raises(AfpqError, match="ascending"):
        Format("mine", (1.0, -1.0))


def test_a_book_that_weights_share_is_written_once() -> None:
    custom, other = parse_format("lut:-1:0:1"), parse_format("lut:-2:0:1")
    nf3, learned = parse_format("nf3"), parse_format("learned3")
    assert repeated_codebook_bytes([nf3, nf3, custom, other, learned, learned]) == 0
    assert repeated_codebook_bytes([custom, other, custom, custom, nf3]) == 2 * custom.codebook_bytes > 0


def test_normal_floats_and_integers_are_found_by_their_width() -> None:
    assert {bits: format.name for bits, format in NORMAL_FLOATS.items()} == {2: "nf2", 3: "nf3", 4: "nf4"}
    assert {bits: format.name for bits, format in INTEGERS.items()} == {bits: f"int{bits}" for bits in BITS}
    assert all(format.start == NORMAL_FLOATS[format.bits] for format in LEARNED.values())
    assert list(LEARNED) == ["learned2", "learned3", "learned4"]
