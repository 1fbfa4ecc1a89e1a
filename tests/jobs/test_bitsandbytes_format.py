# SPDX-License-Identifier: MIT
"""Weights of bitsandbytes, read without it, have exactly the values that it gives them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layout import BOOKS, Layout, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from afpq import AfpqError, AfpqLinear, Scheme
from afpq.checkpoint.reader import Checkpoint, tensor_headers
from afpq.jobs.bitsandbytes_format import BnbWeight, find_weights, fits_float16, read_absmax, read_format, read_weight
from afpq.numerics.formats import FORMATS, parse_format
from afpq.numerics.packing import from_tensors, to_tensors

NAME = "layer.weight"


def opened(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint(directory, {}, tensor_headers(directory / "model.safetensors"))


def scheme_of(checkpoint: Checkpoint, weight: BnbWeight, scale_dtype: str = "float32") -> Scheme:
    return Scheme(read_format(checkpoint, weight)[0], weight.group_size, True, scale_dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


layouts = st.builds(
    Layout,
    kind=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([32, 64, 128, 256]),
    nested=st.booleans(),
    nested_blocksize=st.sampled_from([4, 256]),
)


@given(layouts, st.integers(1, 7), st.integers(1, 9), st.sampled_from([16, 32, 48, 64, 80]), st.integers(0, 99))
@settings(max_examples=60)
def test_the_values_are_exactly_theirs(layout: Layout, rows: int, times: int, unit: int, seed: int) -> None:
    """Also where blocks run across rows, which repeats a block's scale in smaller groups."""
    in_features = unit * times
    tensors, values = packed(NAME, normal(rows, in_features, seed=seed), layout)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = opened(Path(name), tensors)
        weight = find_weights(checkpoint)[NAME]
        scheme = scheme_of(checkpoint, weight)
        found = read_weight(checkpoint, weight, scheme)
        assert scheme.group_size == math.gcd(in_features, layout.blocksize)
        assert torch.equal(found.dequantize(), values)
        again = from_tensors(to_tensors(found), scheme, in_features)
        assert torch.equal(again.dequantize(), values)
        assert bool((found.scales.pos != 0).all())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_codes_may_be_declared_as_any_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    tensors, values = packed(NAME, normal(8, 128), Layout(storage=storage))
    checkpoint = opened(tmp_path, tensors)
    weight = find_weights(checkpoint)[NAME]
    assert torch.equal(read_weight(checkpoint, weight, scheme_of(checkpoint, weight)).dequantize(), values)


def test_the_formats(tmp_path: Path) -> None:
    for kind in ("nf4", "fp4"):
        checkpoint = opened(tmp_path, packed(NAME, normal(4, 64), Layout(kind))[0])
        format, order = read_format(checkpoint, find_weights(checkpoint)[NAME])
        assert torch.equal(torch.tensor(format.values)[order.long()], torch.from_numpy(BOOKS[kind]))
        assert parse_format(format.name) == format and format.bits == 4
        assert (format is FORMATS["nf4"]) == (kind == "nf4")


def test_float16_scales_only_where_they_are_exact(tmp_path: Path) -> None:
    for dtype, nested, exact in (
        (torch.float16, False, True),
        (torch.bfloat16, False, True),
        (torch.float16, True, False),
    ):
        checkpoint = opened(tmp_path, packed(NAME, normal(8, 128, dtype=dtype), Layout(nested=nested))[0])
        assert fits_float16(read_absmax(checkpoint, find_weights(checkpoint)[NAME])) == exact
    assert not fits_float16(torch.tensor([1e6])) and not fits_float16(torch.tensor([1e-9]))


def test_rounded_scales_stay_within_half_a_unit(tmp_path: Path) -> None:
    tensors, values = packed(NAME, normal(8, 128), Layout(nested=True))
    checkpoint = opened(tmp_path, tensors)
    weight = find_weights(checkpoint)[NAME]
    found = read_weight(checkpoint, weight, scheme_of(checkpoint, weight, "float16")).dequantize()
    assert 0 < ((found - values).abs() / values.abs().clamp(min=1e-9)).max() <= 2**-11


def test_groups_of_zeros_and_scales_below_zero(tmp_path: Path) -> None:
    """Double quantization may leave a small scale zero or negative; both mean what they say."""
    weight = normal(4, 128)
    weight[1] = 0
    tensors, values = packed(NAME, weight, Layout())
    tensors[f"{NAME}.absmax"][0] *= -1
    values[0, :64] *= -1
    checkpoint = opened(tmp_path, tensors)
    described = find_weights(checkpoint)[NAME]
    found = read_weight(checkpoint, described, scheme_of(checkpoint, described))
    assert torch.equal(found.dequantize(), values)
    assert bool((found.dequantize()[1] == 0).all()) and bool((found.scales.pos[1] == 1).all())


def test_a_layer_computes_with_them(tmp_path: Path) -> None:
    for kind in ("nf4", "fp4"):
        tensors, values = packed(NAME, normal(48, 192), Layout(kind, nested=True))
        checkpoint = opened(tmp_path, tensors)
        weight = find_weights(checkpoint)[NAME]
        layer = AfpqLinear.from_weight(read_weight(checkpoint, weight, scheme_of(checkpoint, weight)))
        x = normal(3, 192, seed=1, dtype=torch.float32)
        torch.testing.assert_close(layer(x), x @ values.T, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 256), 64), ((80, 96), 64), ((64, 4096), 128), ((7, 32), 512)])
def test_bitsandbytes_itself_agrees(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int], blocksize: int
) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(
        normal(*shape, dtype=torch.bfloat16), blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    tensors = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    checkpoint = opened(tmp_path, {NAME: codes, **tensors})
    weight = find_weights(checkpoint)[NAME]
    assert (weight.kind, weight.blocksize, weight.shape, weight.dtype) == (kind, blocksize, shape, torch.bfloat16)
    state.dtype = torch.float32
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.equal(read_weight(checkpoint, weight, scheme_of(checkpoint, weight)).dequantize(), theirs)


def state_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if "quant_state" in name)


def restate(tensors: dict[str, Tensor], **changes: object) -> None:
    keys = json.loads(bytes(tensors[state_of(tensors)].tolist()))
    text = json.dumps({key: value for key, value in {**keys, **changes}.items() if value is not None})
    tensors[state_of(tensors)] = torch.tensor(list(text.encode()), dtype=torch.uint8)


BROKEN: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: t.pop(f"{NAME}.absmax"), rf"{NAME}\.absmax: is not in the checkpoint"),
    (lambda t: t.pop(NAME), rf"tensor {NAME}: is not in the checkpoint"),
    (lambda t: t.pop(f"{NAME}.nested_quant_map"), r"nested_quant_map: is not"),
    (lambda t: t.update({f"{NAME}.absmax": t[f"{NAME}.absmax"][:-1]}), r"absmax: has 15 bytes.*needs 16"),
    (lambda t: t.update({NAME: t[NAME][:-1]}), rf"{NAME}: has 511 bytes.*needs 512"),
    (lambda t: t[f"{NAME}.nested_absmax"].fill_(float("nan")), r"absmax: contains NaN"),
    (lambda t: t[f"{NAME}.quant_map"].fill_(1), r"quant_map"),
    (lambda t: t[f"{NAME}.quant_map"].fill_(float("nan")), r"quant_map"),
    (lambda t: t[state_of(t)].fill_(65), r"quant_state.*JSON"),
    (lambda t: restate(t, shape=[1024]), r"quant_state"),
    (lambda t: restate(t, shape=[8, 64]), rf"{NAME}: has 512 bytes.*needs 256"),
    (lambda t: restate(t, shape=[-8, -128]), r"make no sense"),
    (lambda t: restate(t, blocksize=0), r"make no sense"),
    (lambda t: restate(t, blocksize="many"), r"quant_state"),
    (lambda t: restate(t, nested_offset=None), r"nested_offset"),
    (lambda t: restate(t, dtype="save"), r"quant_state"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_what_is_broken_is_named(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str) -> None:
    tensors, _ = packed(NAME, normal(8, 128), Layout(nested=True))
    change(tensors)
    with pytest.raises(AfpqError, match=words):
        checkpoint = opened(tmp_path, tensors)
        weight = find_weights(checkpoint)[NAME]
        read_weight(checkpoint, weight, scheme_of(checkpoint, weight))


def test_rows_with_too_little_in_common_with_blocks_are_refused(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, packed(NAME, normal(16, 100), Layout())[0])
    with pytest.raises(AfpqError, match=r"rows of 100 weights and blocks of 64 have only groups of 4 in common"):
        find_weights(checkpoint)


def test_scales_too_large_for_float16_are_named(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, packed(NAME, 1e6 * normal(8, 128, dtype=torch.float32), Layout())[0])
    weight = find_weights(checkpoint)[NAME]
    with pytest.raises(AfpqError, match=rf"{NAME}\.absmax: .* too large for float16"):
        read_weight(checkpoint, weight, scheme_of(checkpoint, weight, "float16"))
