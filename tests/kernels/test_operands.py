# SPDX-License-Identifier: MIT
"""Operands describe a weight, rows of it are a weight too, and those that do not fit together are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afpq import kernels
from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.kernels import reference
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.packing import layout, to_tensors
from afpq.numerics.scheme import Scheme, parse_scheme

SCHEMES = ["nf4-asym-g32", "nf3-sym-g32", "int4-asym-g32", "int3-asym-g32", "int2-asym-g-1", "int8-asym-g32",
           "nf3-asym-g32-log8"]  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_of(text: str, rows: int, columns: int) -> Packed:
    scheme = parse_scheme(text)
    return Packed.from_tensors(to_tensors(quantize_rtn(random(rows, columns), scheme)), scheme)


def layer_of(scheme: Scheme, rows: int, columns: int) -> AfpqLinear:
    return AfpqLinear.from_weight(quantize_rtn(random(rows, columns), scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_tensors_become_operands(scheme: str) -> None:
    parsed = parse_scheme(scheme)
    weight = quantize_rtn(random(12, 100), parsed)
    packed = Packed.from_tensors(to_tensors(weight), parsed)
    assert sum(t is not None for t in packed[:5]) == len(layout(parsed, 12, 100))
    assert packed.check(100) == (parsed.groups(100), 0 if packed.zeros is None else packed.zeros.shape[1])
    assert torch.equal(reference.dequantize(packed, 100, torch.float32), weight.dequantize())
    x, bias = random(3, 100), random(12)
    for b in (None, bias):
        torch.testing.assert_close(
            kernels.linear(x, *packed.arguments(b)), reference.linear(x, packed, b), rtol=1e-4, atol=1e-5
        )


@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.data())
def test_rows_of_a_weight_are_its_rows(scheme: str, rows: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows + 3))
    packed = packed_of(scheme, rows, 70)
    part = packed.rows(first, last)
    part.check(70)
    whole = reference.dequantize(packed, 70, torch.float32)
    assert torch.equal(reference.dequantize(part, 70, torch.float32), whole[first:last])
    again = Packed.from_tensors(to_tensors(quantize_rtn(random(rows, 70), parse_scheme(scheme))), parse_scheme(scheme))
    if part.zeros is not None and (first, min(last, rows)) == (0, rows):
        assert again.zeros is not None and torch.equal(part.zeros, again.zeros)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5 bits"),
        ({"group_size": 0}, "groups of 0"),
        ({"scales": torch.zeros(8, 2, dtype=torch.int32)}, "expected floats, or bytes"),
        ({"grid": torch.zeros(2)}, "a grid is given"),
        ({"codebook": [float("nan")] * 16}, "NaN or Inf"),
        ({"codebook": [0.0] * 17}, "17 values does not fit 4 bits"),
        ({"zeros": torch.zeros(2, 4, dtype=torch.uint8)}, "zero points are for one scale"),
        ({"qweight": None}, "needs qweight"),
    ],
)
def test_operands_that_describe_no_weight_are_refused(change: dict[str, Any], message: str) -> None:
    packed = packed_of("nf4-asym-g32", 8, 64)._replace(**change)
    with pytest.raises(AfpqError, match=message):
        packed.check(64)


def test_inputs_and_bias_must_fit() -> None:
    packed = packed_of("nf4-asym-g32", 8, 64)
    assert packed.check_inputs(random(2, 64), random(8)) == 64
    with pytest.raises(AfpqError, match=r"bias is \[7\], expected \[8\]"):
        packed.check_inputs(random(2, 64), random(7))
    with pytest.raises(AfpqError, match="inputs"):
        packed.check_inputs(torch.tensor(1.0), None)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("qweight", torch.zeros(8, 63, dtype=torch.uint8), "qweight"),
        ("qweight", torch.zeros(8, 32, dtype=torch.int16), "qweight"),
        ("scales_pos", torch.zeros(8, 3, dtype=torch.float16), "scales"),
        ("scales_neg", torch.zeros(7, 2, dtype=torch.float16), "scales_neg"),
        ("scales_neg", torch.zeros(8, 2), "scales_neg"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(name: str, changed: Tensor, message: str) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g32"), 8, 64)
    layer._buffers[name] = changed
    with pytest.raises(AfpqError, match=message):
        layer(random(1, 64))


def test_zero_points_that_do_not_fit_are_refused() -> None:
    layer = layer_of(parse_scheme("int4-asym-g32"), 8, 64)
    layer._buffers["zeros"] = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(AfpqError, match="zeros"):
        layer(random(1, 64))
