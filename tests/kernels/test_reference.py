# SPDX-License-Identifier: MIT
"""The reference computes what the dequantized weight does, also in parts, and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.kernels import reference
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.packing import to_tensors
from afpq.numerics.scheme import parse_scheme


@pytest.mark.parametrize("text", ["int8-sym-g64", "int8-asym-g64", "int3-asym-g32", "nf3-asym-g32-log8"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_unpacks_a_large_weight_in_parts(text: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = AfpqLinear.from_weight(quantize_rtn(torch.randn(45, 96), parse_scheme(text)))
    book = layer.scheme.format
    weight = Packed(layer.qweight, *layer._scale_buffers(), list(book.values), book.bits, layer.scheme.group_size)
    x, b = torch.randn(2, 3, 96), torch.randn(45) if bias else None
    whole = reference.linear(x, weight, b)
    monkeypatch.setattr(reference, "PART_ON_CPU", 16 * 96)
    torch.testing.assert_close(reference.linear(x, weight, b), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_rounds_the_float32_weight_once(dtype: torch.dtype) -> None:
    scheme = parse_scheme("nf3-asym-g32")
    weight = quantize_rtn(torch.randn(9, 70, generator=torch.Generator().manual_seed(0)), scheme)
    packed = Packed.from_tensors(to_tensors(weight), scheme)
    found = reference.dequantize(packed, 70, dtype)
    assert found.dtype == dtype and torch.equal(found, weight.dequantize().to(dtype))


def test_a_weight_is_not_decoded_to_integers_nor_from_operands_that_do_not_fit() -> None:
    scheme = parse_scheme("int4-asym-g32")
    packed = Packed.from_tensors(to_tensors(quantize_rtn(torch.randn(8, 64), scheme)), scheme)
    with pytest.raises(AfpqError, match="choose a type of floats"):
        reference.dequantize(packed, 64, torch.int32)
    assert packed.zeros is not None
    with pytest.raises(AfpqError, match="zeros is"):
        reference.linear(torch.randn(2, 64), packed._replace(zeros=packed.zeros[0]), None)
