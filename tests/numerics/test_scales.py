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
from afpq.numerics.groups import QuantizedWeight, encode, fit_scales, with_grid
from afpq.numerics.packing import from_tensors, layout, to_tensors
from afpq.numerics.scales import (
    LEVELS,
    MOST_OCTAVES,
    SIGN,
    fit_grid,
    from_bytes,
    grid_tensor,
    round_to_storage,
    to_bytes,
)
from afpq.numerics.scheme import ScaleGrid, parse_scheme

SCHEME = parse_scheme("nf4-asym-g32-log8")
POSITIVE = st.lists(st.floats(2.0**-126, 2.0**100, width=32), min_size=1, max_size=20).map(torch.tensor)
GRIDS = st.builds(
    lambda low, step: ScaleGrid(low, step), st.floats(-60, 20, width=32), st.floats(0.0078125, 0.125, width=32)
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(POSITIVE)
def test_a_stored_scale_is_within_half_a_step_or_at_the_end(scales: Tensor) -> None:
    """Of ratio 2^(step / 2); what is smaller than 2^-12 of the largest becomes the smallest of the grid."""
    scheme = fit_grid(SCHEME, scales)
    assert scheme.grid is not None and scheme == SCHEME  # grids do not tell schemes apart
    back, step = round_to_storage(scales, scheme).double(), scheme.grid.step
    smallest = 2.0**scheme.grid.low
    off = (back / scales.double()).log2().abs()
    inside = scales.double() >= smallest
    assert bool((off[inside] <= step / 2 + 1e-4).all())
    assert bool((back[~inside] / smallest - 1 < 1e-5).all())
    assert smallest <= max(scales.min().item(), scales.max().item() * 2.0 ** (1 - MOST_OCTAVES))
    assert step <= MOST_OCTAVES / (LEVELS - 1) + 1e-6


@given(GRIDS, st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bytes_round_trip_exactly(grid: ScaleGrid, numbers: list[int]) -> None:
    scales = from_bytes(torch.tensor(numbers, dtype=torch.uint8), grid_tensor(grid))
    assert to_bytes(scales, grid).tolist() == numbers
    assert (scales < 0).tolist() == [number >= SIGN for number in numbers]
    scheme = replace(SCHEME, grid=grid)
    assert torch.equal(round_to_storage(scales.abs(), scheme), scales.abs())


def test_the_grid_is_two_to_the_power_of_low_plus_step_times_k() -> None:
    grid = ScaleGrid(-3.5, 0.0625)
    scales = from_bytes(torch.arange(256, dtype=torch.int32).to(torch.uint8), grid_tensor(grid))
    for k in range(LEVELS):
        assert scales[k].item() == pytest.approx(math.exp2(-3.5 + 0.0625 * k), rel=1e-7)
        assert scales[SIGN + k] == -scales[k]


def test_other_scale_dtypes_have_no_grid() -> None:
    scheme = parse_scheme("nf4-asym-g32")
    assert fit_grid(scheme, torch.ones(3)) is scheme
    assert with_grid(random(4, 64), scheme) is scheme
    fitted = with_grid(random(4, 64), SCHEME)
    assert with_grid(100 * random(4, 64), fitted) is fitted  # fitted once


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
    fitted = with_grid(W, scheme)
    clips = search_clips(W, H, fitted)
    solved = [
        quantize_rtn(W, scheme),
        quantize_rtn(W, scheme, "mse"),
        quantize_gptq(W, H, scheme)[0],
        QuantizedWeight(encode(W, clips, fitted), clips, fitted),
    ]
    for weight in solved:
        tensors = to_tensors(weight)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout(scheme, 24, 96)
        again = from_tensors(tensors, scheme, 96)
        assert torch.equal(again.dequantize(), weight.dequantize())
        assert again.scheme.grid == weight.scheme.grid
    losses = [((w.dequantize() - W) @ H * (w.dequantize() - W)).sum() for w in solved]
    assert losses[2] < losses[1] < 1.01 * losses[0] and losses[2] < losses[3]


def test_true_bits_count_bytes_and_the_grid() -> None:
    sizes = [
        dtype.itemsize * math.prod(shape)
        for dtype, shape in layout(parse_scheme("nf3-asym-g64-log8"), 512, 512).values()
    ]
    assert 8 * sum(sizes) / 512**2 == 3 + 2 * 8 / 64 + 64 / 512**2


def test_a_scheme_without_its_grid_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="fit_grid"):
        fit_scales(random(4, 64), SCHEME)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["nf4-asym-g8", "nf3-sym-g8", "int4-sym-g8", "nf4-asym-g8-log8"]))
def test_negative_scales_mean_the_mirrored_book(seed: int, kind: str) -> None:
    """encode and decode with both scales negative are those of the negated weight, negated."""
    weight = random(4, 24, seed=seed)
    scheme = with_grid(weight, parse_scheme(kind))
    scales = fit_scales(weight, scheme)
    mirrored = replace(scales, pos=-scales.pos, neg=-scales.neg)
    ours, plain = encode(weight, mirrored, scheme), encode(-weight, scales, scheme)
    assert torch.equal(ours, plain)
    back = QuantizedWeight(ours, mirrored, scheme).dequantize()
    assert torch.equal(back, -QuantizedWeight(plain, scales, scheme).dequantize())
