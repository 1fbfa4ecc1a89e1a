# SPDX-License-Identifier: MIT
"""Each storage keeps what it rounds to; grids are as near as they promise; one more row is one more storage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afpq import kernels
from afpq.algorithms import quantize_gptq, quantize_rtn
from afpq.errors import AfpqError
from afpq.kernels import reference
from afpq.kernels.operands import Packed
from afpq.numerics.packing import from_tensors, layout, to_tensors
from afpq.numerics.scale_storage import (
    LEVELS,
    MOST_OCTAVES,
    SCALE_STORAGES,
    SIGN,
    ScaleGrid,
    ScaleStorage,
    check_scales_finite,
    decode_stored,
    from_bytes,
    grid_for,
    grid_tensor,
    on_grid,
    to_bytes,
)
from afpq.numerics.scheme import parse_scheme

POSITIVE = st.lists(st.floats(2.0**-126, 2.0**100, width=32), min_size=1, max_size=20).map(torch.tensor)
GRIDS = st.builds(
    lambda low, step: ScaleGrid(low, step), st.floats(-60, 20, width=32), st.floats(0.0078125, 0.125, width=32)
)
NAMES = st.sampled_from(list(SCALE_STORAGES))


@given(POSITIVE)
def test_a_stored_scale_is_within_half_a_step_or_at_the_end(scales: Tensor) -> None:
    """Of ratio 2^(step / 2); what is smaller than 2^-12 of the largest becomes the smallest of the grid."""
    grid = grid_for(scales)
    back, step = on_grid(scales, grid).double(), grid.step
    smallest = 2.0**grid.low
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
    assert torch.equal(on_grid(scales.abs(), grid), scales.abs())


def test_the_grid_is_two_to_the_power_of_low_plus_step_times_k() -> None:
    grid = ScaleGrid(-3.5, 0.0625)
    scales = from_bytes(torch.arange(256, dtype=torch.int32).to(torch.uint8), grid_tensor(grid))
    for k in range(LEVELS):
        assert scales[k].item() == pytest.approx(math.exp2(-3.5 + 0.0625 * k), rel=1e-7)
        assert scales[SIGN + k] == -scales[k]


def test_scales_that_are_all_zero_still_have_a_grid_around_one() -> None:
    grid = grid_for(torch.zeros(3))
    assert on_grid(torch.ones(1), grid).item() == 1


@given(NAMES, POSITIVE, st.booleans())
def test_what_a_storage_rounds_to_is_what_it_gives_back(name: str, scales: Tensor, mirrored: bool) -> None:
    storage = SCALE_STORAGES[name]
    grid = grid_for(scales) if storage.needs_grid else None
    saved_grid = None if grid is None else grid_tensor(grid)
    kept = storage.round(scales.clamp(storage.smallest, 6e4), grid) * (-1 if mirrored else 1)
    stored = storage.encode(kept, grid)
    assert kept.dtype == storage.memory_dtype and stored.dtype == storage.dtype
    assert storage.bits == 8 * stored.element_size()
    assert torch.equal(storage.decode(stored, saved_grid), kept)
    assert torch.equal(decode_stored(stored, saved_grid), kept)
    assert bool((kept != 0).all())


def test_a_dtype_on_disk_tells_the_storage() -> None:
    assert len({storage.dtype for storage in SCALE_STORAGES.values()}) == len(SCALE_STORAGES)
    assert {name: storage.name for name, storage in SCALE_STORAGES.items()} == {name: name for name in SCALE_STORAGES}


def test_no_grid_is_an_error_where_one_is_needed() -> None:
    for convert in (on_grid, to_bytes):
        with pytest.raises(AfpqError, match="grid"):
            convert(torch.ones(2), None)
    with pytest.raises(AfpqError, match="grid"):
        from_bytes(torch.ones(2, dtype=torch.uint8), None)


def test_scales_that_are_or_become_infinite_are_named() -> None:
    codes = torch.zeros(2, dtype=torch.uint8)
    fine = {"scales": torch.ones(2).half(), "qweight": codes, "scale_grid": torch.tensor([1.0, 0.1])}
    check_scales_finite(fine)
    for name, bad in (("scales", torch.tensor([1.0, math.inf])), ("scale_grid", torch.tensor([1.0, 2.0]))):
        with pytest.raises(AfpqError, match=f"layer.{name}"):  # 2^(1 + 2 * 127) is no float32
            check_scales_finite(fine | {name: bad}, "layer.")


def float8() -> ScaleStorage:
    """float8 on disk, float32 in memory."""

    def encode(scales: Tensor, grid: ScaleGrid | None) -> Tensor:
        return scales.to(torch.float8_e4m3fn)

    def decode(stored: Tensor, grid: Tensor | None) -> Tensor:
        return stored.float()

    def round(scales: Tensor, grid: ScaleGrid | None) -> Tensor:
        return decode(encode(scales, grid), None)

    dtypes = "float8_e4m3fn", "float32"
    return ScaleStorage("float8", *dtypes, 2.0**-9, False, round=round, encode=encode, decode=decode)


def log16() -> ScaleStorage:
    """The bytes of log8 in int16: a dtype of integers that needs a grid."""

    def encode(scales: Tensor, grid: ScaleGrid | None) -> Tensor:
        return to_bytes(scales, grid).to(torch.int16)

    def decode(stored: Tensor, grid: Tensor | None) -> Tensor:
        return from_bytes(stored, grid)

    return ScaleStorage("log16", "int16", "float32", 2.0**-126, True, on_grid, encode, decode)


@pytest.mark.parametrize("kind", ["nf3-asym", "nf4-sym", "int4-asym"])
@pytest.mark.parametrize("storage", [float8(), log16()], ids=lambda storage: storage.name)
def test_a_row_more_is_a_storage_for_solvers_files_and_the_ops(
    monkeypatch: pytest.MonkeyPatch, storage: ScaleStorage, kind: str
) -> None:
    monkeypatch.setitem(SCALE_STORAGES, storage.name, storage)
    scheme = parse_scheme(f"{kind}-g32-{storage.name}")
    assert str(scheme) == f"{kind}-g32-{storage.name}"
    dice = torch.Generator().manual_seed(0)
    weight, x = 8 * torch.randn(16, 96, generator=dice), torch.randn(64, 96, generator=dice)
    plain = quantize_rtn(weight, parse_scheme(f"{kind}-g32"), "mse")
    for solved in (quantize_rtn(weight, scheme, "mse"), quantize_gptq(weight, x.T @ x, scheme)[0]):
        solved.validate()
        tensors = to_tensors(solved)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == layout(scheme, 16, 96)
        assert torch.equal(from_tensors(tensors, scheme, 96).dequantize(), solved.dequantize())
        scales = tensors.get("scales_pos", tensors.get("scales"))
        assert scales is not None
        tail = tensors.get("scales_neg"), tensors.get("zeros"), tensors.get("scale_grid")
        book = scheme.format.values, scheme.format.bits, 32
        wanted = x @ solved.dequantize().T
        packed = Packed(tensors["qweight"], scales, *tail, list(book[0]), *book[1:])
        assert torch.equal(reference.linear(x, packed, None), wanted)
        # Native kernels leave a dtype that they do not have to the reference.
        assert torch.equal(kernels.linear(x, tensors["qweight"], scales, *tail, None, *book), wanted)
    error = (quantize_rtn(weight, scheme, "mse").dequantize() - weight).norm()
    assert error < 1.3 * (plain.dequantize() - weight).norm()


def test_without_the_row_there_is_no_such_storage() -> None:
    with pytest.raises(AfpqError, match="float8"):
        parse_scheme("nf3-asym-g32-float8")
