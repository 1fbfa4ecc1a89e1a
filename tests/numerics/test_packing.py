# SPDX-License-Identifier: MIT
"""Packed bytes hold every code at its documented bit, in exactly the bytes announced."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.numerics.formats import BITS, FORMATS, custom_format
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import codes_at, from_tensors, layout, pack, packed_size, spec_bytes, to_tensors, unpack
from afpq.numerics.scheme import Scheme, parse_scheme

numeric = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WIDTHS = range(1, 9)  # all that can be packed, of which formats use some
SCHEMES = st.builds(
    Scheme,
    st.sampled_from([*FORMATS.values(), custom_format([-1, -0.5, 0.1, 1])]),
    st.sampled_from([-1, 1, 5, 32]),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
)


@st.composite
def code_tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(codes of up to three dimensions, their bits)."""
    bits = draw(st.sampled_from(WIDTHS))
    shape = [*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 70))]
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=prod(shape), max_size=prod(shape)))
    return torch.tensor(codes, dtype=torch.uint8).view(shape), bits


def bytes_by_hand(codes: list[int], bits: int) -> list[int]:
    """The documented layout, one code and one bit at a time."""
    whole = {1: 1, 2: 1, 3: 3, 4: 1, 5: 5, 6: 3, 7: 7, 8: 1}[bits]  # bytes
    stream = sum(code << (bits * k) for k, code in enumerate(codes))
    size = -(-len(codes) * bits // (8 * whole)) * whole
    return list(stream.to_bytes(size, "little"))


@numeric
@given(code_tensors())
def test_unpacking_undoes_packing(given: tuple[Tensor, int]) -> None:
    codes, bits = given
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*codes.shape[:-1], packed_size(codes.shape[-1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[-1]), codes)


@numeric
@given(code_tensors(), st.data())
def test_single_codes_are_found_in_the_bytes(given: tuple[Tensor, int], data: st.DataObject) -> None:
    codes, bits = given
    count = codes.shape[-1]
    index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5)))
    assert torch.equal(codes_at(pack(codes, bits), bits, index), codes[..., index])


def test_every_width_of_a_format_can_be_packed() -> None:
    assert set(BITS) <= set(WIDTHS)


@numeric
@given(code_tensors())
def test_every_code_is_at_its_documented_bits(given: tuple[Tensor, int]) -> None:
    codes, bits = given
    rows = codes.reshape(-1, codes.shape[-1]).tolist()
    assert pack(codes, bits).reshape(len(rows), -1).tolist() == [bytes_by_hand(row, bits) for row in rows]


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (8, [7, 255, 0], [7, 255, 0]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (2, [1, 2, 3, 0, 1], [0b00111001, 1]),
        (3, [1, 2, 4, 7, 0, 0, 0, 5, 6], [0b00010001, 0b00001111, 0b10100000, 6, 0, 0]),
        (5, [1, 31], [0b11100001, 0b11, 0, 0, 0]),
        (6, [1, 63, 0, 2, 5], [0b11000001, 0b1111, 0b1000, 5, 0, 0]),
    ],
)
def test_layout_by_hand(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == packed


@pytest.mark.parametrize("bits", WIDTHS)
def test_views_pack_like_their_copies(bits: int) -> None:
    codes = torch.randint(2**bits, (34, 65), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for view in (
        codes[:, 1:],
        codes.T,
        codes[3],
        codes[1:, 1:33],
        codes[::2, ::3],
        codes[:32, :1].T,
        codes.view(-1)[1:65],
    ):
        assert torch.equal(pack(view, bits), pack(view.clone(memory_format=torch.contiguous_format), bits))
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed[3:5], bits, 65), codes[3:5])
    assert torch.equal(unpack(packed.T.contiguous().T, bits, 65), codes)


@pytest.mark.parametrize(
    ("bits", "count", "size"),
    [
        (2, 1, 1),
        (2, 5, 2),
        (4, 1, 1),
        (4, 3, 2),
        (3, 1, 3),
        (3, 8, 3),
        (3, 9, 6),
        (5, 8, 5),
        (5, 9, 10),
        (6, 3, 3),
        (6, 5, 6),
        (8, 5, 5),
    ],
)
def test_packed_size(bits: int, count: int, size: int) -> None:
    assert packed_size(count, bits) == size


# --- saved tensors


@st.composite
def quantized(draw: st.DrawFn) -> QuantizedWeight:
    """A small random weight, quantized by a random scheme; the last group may be short."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return quantize_rtn(weight, draw(SCHEMES))


@numeric
@given(quantized())
def test_layout_announces_every_tensor(weight: QuantizedWeight) -> None:
    tensors = to_tensors(weight)
    announced = layout(weight.scheme, *weight.codes.shape)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == announced
    assert list(tensors) == list(announced)
    assert all(spec_bytes(announced[name]) == tensor.nbytes for name, tensor in tensors.items())


@numeric
@given(quantized())
def test_saved_tensors_give_the_weight_back(weight: QuantizedWeight) -> None:
    back = from_tensors(to_tensors(weight), weight.scheme, weight.codes.shape[1])
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales.pos, weight.scales.pos) and torch.equal(back.scales.neg, weight.scales.neg)
    assert (back.scales.zero is None) == (weight.scales.zero is None)
    if back.scales.zero is not None and weight.scales.zero is not None:
        assert torch.equal(back.scales.zero, weight.scales.zero)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert back.scheme == weight.scheme


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 32, 64])
@pytest.mark.parametrize("format", ["int2", "int3", "int4", "int8"])
def test_zero_points_of_one_group_a_row(format: str, rows: int) -> None:
    weight = quantize_rtn(torch.randn(rows, 9), parse_scheme(f"{format}-asym-g-1"))
    back = from_tensors(to_tensors(weight), weight.scheme, 9)
    assert torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("nf4-asym-g8", ["qweight", "scales_pos", "scales_neg"]),
        ("nf4-sym-g8", ["qweight", "scales"]),
        ("int4-asym-g8", ["qweight", "scales", "zeros"]),
        ("int4-sym-g8", ["qweight", "scales"]),
    ],
)
def test_names_of_saved_tensors(text: str, names: list[str]) -> None:
    assert list(layout(parse_scheme(text), 4, 16)) == names


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("nf3-asym-g128", 3.25),
        ("nf3-sym-g128", 3.125),
        ("nf4-asym-g128", 4.25),
        ("nf4-sym-g128", 4.125),
        ("nf4-asym-g64", 4.5),
        ("int3-asym-g128", 3.1484375),
        ("int4-asym-g128", 4.15625),
        ("nf2-asym-g64", 2.5),
        ("int8-sym-g128", 8.125),
        ("nf4-asym-g128-float32", 4.5),
        ("nf3-asym-g-1", 3 + 32 / 4096),
    ],
)
def test_true_bits_per_weight(text: str, bits: float) -> None:
    specs = layout(parse_scheme(text), 4096, 4096).values()
    assert 8 * sum(map(spec_bytes, specs)) / 4096**2 == bits
