# SPDX-License-Identifier: MIT
"""Decoding of float8 and MXFP4 against definitions in float64, value by value, at ragged shapes."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from afpq.numerics.float8_decoding import decode_float8
from afpq.numerics.mxfp4_decoding import decode_mxfp4

SIZES, BLOCKS = st.integers(1, 40), st.integers(1, 17)


def e4m3(byte: int) -> float:
    """The value of a byte: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinities."""
    sign, exponent, fraction = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (2.0**-6 * fraction / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + fraction / 8))


def e2m1(code: int) -> float:
    """The value of 4 bits: sign, 2 bits of exponent with bias 1, 1 of fraction."""
    sign, exponent, fraction = (-1) ** (code >> 3), code >> 1 & 3, code & 1
    return float(sign * (0.5 * fraction if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)))


@given(SIZES, SIZES, BLOCKS, BLOCKS, st.integers(0, 2**32))
def test_float8_is_value_times_scale(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-rows // high), -(-columns // wide), generator=generator)
    found = decode_float8(codes.view(torch.float8_e4m3fn), scales, (high, wide))
    expected = torch.tensor(
        [
            [e4m3(int(codes[r, c])) * float(scales[r // high, c // wide].double()) for c in range(columns)]
            for r in range(rows)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(found.nan_to_num(), expected.float().nan_to_num())  # rounded once
    assert torch.equal(found.isnan(), expected.isnan())


def test_float8_of_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    found = decode_float8(codes.view(torch.float8_e4m3fn), torch.tensor([[2.0**-20]]), (1, 256))[0].double()
    expected = torch.tensor([e4m3(code) * 2.0**-20 for code in range(256)], dtype=torch.float64)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_mxfp4_is_value_times_power_of_two(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (rows, groups, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(253, (rows, groups), generator=generator, dtype=torch.uint8)  # above, 6.0 is Inf
    found = decode_mxfp4(blocks, exponents)
    for row in range(rows):
        for column in range(32 * groups):
            group, place = divmod(column, 32)
            byte = int(blocks[row, group, place // 2])
            code = byte >> 4 if place % 2 else byte & 15
            assert float(found[row, column]) == e2m1(code) * 2.0 ** (int(exponents[row, group]) - 127)
    assert torch.equal(found, found.bfloat16().float())  # which bfloat16 holds exactly


def test_mxfp4_as_transformers_decodes_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 5, 2, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(100, 140, (3, 5, 2), generator=generator, dtype=torch.uint8)
    found = torch.stack([decode_mxfp4(b, e).T for b, e in zip(blocks, exponents)])
    assert torch.equal(found, convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32))
