# SPDX-License-Identifier: MIT
"""Round to nearest takes any float matrix, of any size, and the second scale pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.scales import fit_scales
from afpq.numerics.scheme import parse_scheme

KINDS = ["nf4-asym", "fp3-sym", "int3-asym", "int8-sym"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(one: QuantizedWeight, other: QuantizedWeight) -> None:
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales.pos, other.scales.pos) and torch.equal(one.scales.neg, other.scales.neg)
    assert (one.scales.zero is None) == (other.scales.zero is None)
    if one.scales.zero is not None and other.scales.zero is not None:
        assert torch.equal(one.scales.zero, other.scales.zero)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "search"), [((1000, 300), "absmax"), ((1000, 300), "mse"), ((2, 2**18 + 5), "absmax")], ids=str
)
def test_a_large_matrix_is_its_rows(shape: tuple[int, int], search: str, kind: str) -> None:
    weight, scheme = gaussian(*shape), parse_scheme(f"{kind}-g128")
    importance = gaussian(shape[1]).square() if search == "mse" else None
    whole = quantize_rtn(weight, scheme, search, importance)
    for row in {0, 1, len(weight) // 3, len(weight) - 1}:
        one = slice(row, row + 1)
        part = QuantizedWeight(whole.codes[one], whole.scales[one], scheme)
        assert_equal(part, quantize_rtn(weight[one], scheme, search, importance))


@pytest.mark.parametrize("kind", KINDS)
def test_absmax_is_fit_then_encode(kind: str) -> None:
    weight, scheme = gaussian(900, 333), parse_scheme(f"{kind}-g64")
    scales = fit_scales(weight, FittedScheme(scheme))
    assert_equal(quantize_rtn(weight, scheme), QuantizedWeight(encode(weight, scales, scheme), scales, scheme))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_any_float_dtype_gives_what_its_float32_gives(kind: str, dtype: torch.dtype) -> None:
    weight, scheme = gaussian(7, 50).to(dtype), parse_scheme(f"{kind}-g16")
    solved = quantize_rtn(weight, scheme)
    assert_equal(solved, quantize_rtn(weight.float(), scheme))
    assert solved.codes.dtype == torch.uint8 and solved.codes.shape == (7, 50)
    assert solved.scales.pos.dtype == torch.float16 and solved.scales.pos.shape == (7, 4)
    assert solved.dequantize().dtype == torch.float32
    assert solved.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert solved.scheme == scheme


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_the_weight_itself_is_not_touched(search: str) -> None:
    weight = gaussian(5, 40)
    before = weight.clone()
    quantize_rtn(weight, parse_scheme("nf3-asym-g16"), search)
    assert torch.equal(weight, before)


def test_views_and_transposes_are_fine() -> None:
    weight, scheme = gaussian(40, 24), parse_scheme("nf4-asym-g7")
    assert_equal(quantize_rtn(weight.T, scheme), quantize_rtn(weight.T.contiguous(), scheme))
    assert_equal(quantize_rtn(weight[3:, 1:20], scheme), quantize_rtn(weight[3:, 1:20].clone(), scheme))


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(AfpqError, match="matrix"):
        quantize_rtn(torch.zeros(shape), parse_scheme("nf4-asym-g128"))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_inf_are_errors(dtype: torch.dtype, bad: float, search: str) -> None:
    weight = gaussian(3, 20).to(dtype)
    weight[2, 17] = bad
    with pytest.raises(AfpqError, match="NaN or Inf"):
        quantize_rtn(weight, parse_scheme("nf4-asym-g8"), search)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("format", ["nf4", "nf3", "nf2", "fp4", "fp3"])
def test_a_scale_for_each_sign_beats_one_scale(format: str, group: int, search: str) -> None:
    weight = gaussian(128, 256, seed=3)
    errors = [
        (quantize_rtn(weight, parse_scheme(f"{format}-{side}-g{group}"), search).dequantize() - weight).square().sum()
        for side in ("asym", "sym")
    ]
    assert errors[0] <= errors[1]
