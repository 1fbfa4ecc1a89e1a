# SPDX-License-Identifier: MIT
"""Scales on a grid: as near as the grid promises, exact through bytes, fitted to the weight; mirrored books."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.algorithms import quantize_gptq, quantize_rtn, search_clips
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.packing import from_tensors, layout, to_tensors
from afpq.numerics.scale_storage import LEVELS
from afpq.numerics.scales import fit_grid, fit_scales
from afpq.numerics.scheme import parse_scheme

SCHEME = parse_scheme("nf4-asym-g32-log8")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_grid_is_fitted_exactly_where_scales_are_stored_on_one() -> None:
    scheme = parse_scheme("nf4-asym-g32")
    assert fit_grid(random(4, 64), scheme) == FittedScheme(scheme)
    one, other = fit_grid(random(4, 64), SCHEME), fit_grid(100 * random(4, 64), SCHEME)
    assert one.scheme == other.scheme == SCHEME and one.grid is not None and other.grid is not None
    assert other.grid.low - one.grid.low == pytest.approx(math.log2(100), abs=1e-4)


def test_a_grid_spans_the_scales_of_its_weight() -> None:
    weight = random(8, 64) * random(8, 1, seed=1).exp()
    fitted = fit_grid(weight, SCHEME)
    exact = fit_scales(weight, FittedScheme(replace(SCHEME, scale_dtype="float32")))
    assert fitted.grid is not None
    for side in (exact.pos, exact.neg):
        assert 2**fitted.grid.low < side.min() and side.max() < 2 ** (fitted.grid.low + (LEVELS - 1) * fitted.grid.step)
    stored = fit_scales(weight, fitted)
    assert stored.grid == fitted.grid
    assert ((stored.pos / exact.pos).log2().abs() <= fitted.grid.step / 2 + 1e-4).all()


def test_a_learned_format_has_no_grid_yet() -> None:
    with pytest.raises(AfpqError, match="learned"):
        fit_grid(random(4, 64), parse_scheme("learned3-asym-g32-log8"))


@pytest.mark.parametrize("kind", ["nf4-asym", "nf3-sym", "int4-asym", "int3-sym", "fp3-asym"])
def test_bytes_cost_next_to_nothing_against_float16(kind: str) -> None:
    """Rows differ by a factor of 100 here, which makes steps of 6 %; in a transformer they are 2 or 3 %."""
    weight = random(64, 512) * random(64, 1, seed=1).exp()
    errors = []
    for tail in ("", "-log8"):
        scheme = parse_scheme(f"{kind}-g64{tail}")
        errors.append((quantize_rtn(weight, scheme, "mse").dequantize() - weight).square().sum())
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_any_magnitude_of_weights(scale: float) -> None:
    """Where float16 scales would be errors or lose their precision."""
    weight = random(8, 64) * scale  # its squares overflow float32
    backs = [quantize_rtn(w, SCHEME).dequantize().double() for w in (weight, weight / scale)]
    relative = [((b - w.double()).norm() / w.double().norm()).item() for b, w in zip(backs, (weight, weight / scale))]
    assert relative[0] == pytest.approx(relative[1], rel=1e-2)


def test_zeros_stay_zeros_and_outliers_do_not_flush_the_rest() -> None:
    weight = random(8, 128)
    weight[0], weight[1, :32] = 0, 0
    weight[2, 5] = 3e3
    back = quantize_rtn(weight, SCHEME).dequantize()
    assert not back[0].any() and not back[1, :32].any()
    assert (back[3:] - weight[3:]).norm() < 0.12 * weight[3:].norm()
    assert not quantize_rtn(torch.zeros(4, 64), SCHEME).dequantize().any()


@pytest.mark.parametrize("kind", ["nf3-asym-g32-log8", "nf3-sym-g32-log8", "int3-asym-g32-log8", "nf4-asym-g-1-log8"])
def test_every_solver_leaves_scales_on_the_grid(kind: str) -> None:
    W, X = random(24, 96), random(400, 96, seed=1)
    H, scheme = X.T @ X, parse_scheme(kind)
    fitted = fit_grid(W, scheme)
    clips = search_clips(W, H, fitted)
    solved = [
        quantize_rtn(W, scheme),
        quantize_rtn(W, scheme, "mse"),
        quantize_gptq(W, H, scheme)[0],
        QuantizedWeight(encode(W, clips, scheme), clips, scheme),
    ]
    for weight in solved:
        tensors = to_tensors(weight)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout(scheme, 24, 96)
        again = from_tensors(tensors, scheme, 96)
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert again.scales.grid == weight.scales.grid is not None
        weight.validate()
    losses = [((w.dequantize() - W) @ H * (w.dequantize() - W)).sum() for w in solved]
    assert losses[2] < losses[1] < 1.01 * losses[0] and losses[2] < losses[3]


def test_true_bits_count_bytes_and_the_grid() -> None:
    sizes = [
        dtype.itemsize * math.prod(shape)
        for dtype, shape in layout(parse_scheme("nf3-asym-g64-log8"), 512, 512).values()
    ]
    assert 8 * sum(sizes) / 512**2 == 3 + 2 * 8 / 64 + 64 / 512**2


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["nf4-asym-g8", "nf3-sym-g8", "int4-sym-g8", "nf4-asym-g8-log8"]))
def test_negative_scales_mean_the_mirrored_book(seed: int, kind: str) -> None:
    """encode and decode with both scales negative are those of the negated weight, negated."""
    weight = random(4, 24, seed=seed)
    scheme = parse_scheme(kind)
    scales = fit_scales(weight, fit_grid(weight, scheme))
    mirrored = replace(scales, pos=-scales.pos, neg=-scales.neg)
    ours, plain = encode(weight, mirrored, scheme), encode(-weight, scales, scheme)
    assert torch.equal(ours, plain)
    back = QuantizedWeight(ours, mirrored, scheme).dequantize()
    assert torch.equal(back, -QuantizedWeight(plain, scales, scheme).dequantize())
