# SPDX-License-Identifier: MIT
"""The GPU kernels against float64 and the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.kernels import gpu, gpu_counters, reference
from afpq.kernels.gpu_tiles import MOST_TOKENS, Tile
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.formats import FORMATS, custom_format, parse_format
from afpq.numerics.scheme import Scheme, parse_scheme

pytest.importorskip("triton")

BOOKS = [*(f for f in FORMATS.values() if f.bits in gpu.FAST_BITS), custom_format([-3.0, -0.2, 0.0, 0.5, 1.0])]
BOOKS.append(custom_format([-0.25, 0.5, 1.0]))  # no zero, and a code to spare
GROUPS = [-1, 32, 64, 96, 128, 160, 256, 48, 7]  # the last two only through decoded panels
SCHEMES = st.builds(
    Scheme,
    st.sampled_from(BOOKS),
    st.sampled_from(GROUPS),
    st.booleans(),
    st.sampled_from(["float16", "float32", "log8"]),
)
SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 300), st.sampled_from([1, 2, 5, 16, 17, 33, 65, 257]))
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
# Float32 sums of up to 300 terms, and products with scales: far below the 16-bit roundings, all there is in float32.
SUMS = 1e-6
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(scheme: Scheme, rows: int, columns: int, bias: bool, device: torch.device) -> AfpqLinear:
    weight = random(rows, columns) * random(rows, 1, seed=1).exp()
    weight[0] = weight[0].abs()  # one-sided groups
    layer = AfpqLinear.from_weight(quantize_rtn(weight, scheme), random(rows, seed=2) if bias else None)
    return layer.to(device)


def run(layer: AfpqLinear, x: Tensor) -> Tensor:
    """What the op does on GPUs, on any tensors."""
    book = layer.scheme.format
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    weight = Packed(layer.qweight, *layer._scale_buffers(), list(book.values), book.bits, layer.scheme.group_size)
    return gpu.linear(x, weight, bias)


def check(layer: AfpqLinear, x: Tensor, roundings: float) -> Tensor:
    """||each output|| is within `roundings` units of its dtype, and one for the result itself; returns the outputs."""
    y = run(layer, x)
    W, bias = layer.dequantize().double(), 0.0 if layer.bias is None else layer.bias.to(x.dtype).double()
    wanted = x.double() @ W.T + bias
    size = x.double().abs() @ W.abs().T + abs(bias)
    assert y.dtype == x.dtype
    bound = (roundings * EPS[x.dtype] + SUMS) * size + EPS[x.dtype] * wanted.abs()
    assert ((y.double() - wanted).abs() <= bound).all()
    return y


# Roundings to the dtype of x: of the code book's value, and where weights are scaled in that dtype, also of the scale
# (float16 scales in bfloat16, others in either) and of the product. Torch's product takes weights rounded once.
@settings(max_examples=120)
@given(scheme=SCHEMES, shape=SHAPES, bias=st.booleans(), dtype=st.sampled_from(list(EPS)))
def test_linear_equals_float64(
    scheme: Scheme, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    rows, columns, tokens = shape
    layer = layer_of(scheme, rows, columns, bias, device)
    check(layer, random(tokens, columns, seed=3).to(device, dtype), 3 if 64 < tokens <= MOST_TOKENS else 1)


@settings(max_examples=60)
@given(
    scheme=SCHEMES,
    rows=st.integers(1, 40),
    columns=st.integers(1, 600),
    dtype=st.sampled_from([*EPS, torch.float64]),
)
def test_dequantize_equals_the_reference_to_the_last_bit(
    scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    layer = layer_of(scheme, rows, columns, False, device)
    book = layer.scheme.format
    weight = Packed(layer.qweight, *layer._scale_buffers(), list(book.values), book.bits, scheme.group_size)
    ours, wanted = (f.dequantize(weight, columns, dtype) for f in (gpu, reference))
    if scheme.scale_dtype == "log8":  # 2^x of another library, 3 units of float32 off at most
        assert ours.dtype == dtype
        limit = 2.0**-21 + 2 * EPS.get(dtype, 0.0)  # where a rounding lies between the two, they are a whole step apart
        smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        assert ((ours.double() - wanted.double()).abs() <= limit * 1.01 * wanted.double().abs() + 1.01 * smallest).all()
    else:
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("kind", ["nf4-asym-g128", "nf3-asym-g64", "nf2-sym-g128", "int4-asym-g128", "int3-asym-g-1"])
def test_every_tile_of_the_table(
    kind: str, capability: tuple[int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more rows than a tile, a short last tile, and columns split among programs."""
    if device.type == "cuda" and capability != torch.cuda.get_device_capability():
        pytest.skip("another GPU's tiles")
    monkeypatch.setattr(gpu, "_capability", lambda device: capability)
    layer = layer_of(parse_scheme(kind), 136, 1152, True, device)
    for tokens in (3, 20, 40, 100):
        check(layer, random(tokens, 1152, seed=3).to(device, torch.float16), 3 if tokens > 64 else 1)


def test_columns_of_a_row_are_split_and_added_in_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(parse_scheme("nf3-asym-g128"), 72, 2048, False, device)
    x = random(2, 2048, seed=3).to(device, torch.float16)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda device: 1)
    whole = check(layer, x, 1)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda device: 8)
    monkeypatch.setattr(gpu_counters, "_counters", {})
    first = check(layer, x, 1)
    [counters] = gpu_counters._counters.values()
    [counter] = counters.streams.values()
    assert not counter.any()  # ready for the next call
    assert all(torch.equal(run(layer, x), first) for _ in range(3))
    assert not torch.equal(whole, first) or torch.allclose(whole, first)


def test_a_single_group_sums_up_over_the_whole_row(device: torch.device) -> None:
    for size in (-1, 512, 1000):  # 1000: longer than the row
        layer = layer_of(Scheme(parse_format("nf4"), size, False, "float16"), 24, 512, False, device)
        check(layer, random(4, 512, seed=3).to(device, torch.float16), 1)


def test_weights_that_do_not_start_at_a_word(device: torch.device) -> None:
    """A row of 100 columns has 50 bytes; and a view may start at any byte."""
    for columns in (100, 128):
        layer = layer_of(parse_scheme("nf4-asym-g32"), 9, columns, False, device)
        moved = torch.cat([layer.qweight.new_zeros(1), layer.qweight.flatten()])[1:].view_as(layer.qweight)
        layer._buffers["qweight"] = moved
        assert moved.data_ptr() % 4
        check(layer, random(3, columns, seed=3).to(device, torch.bfloat16), 1)


def test_panels_are_as_large_as_half_the_cache(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g64"), 400, 64, True, device)
    x = random(MOST_TOKENS + 1, 64, seed=3).to(device, torch.float16)
    whole = check(layer, x, 1)
    monkeypatch.setattr(gpu, "_panel_bytes", lambda device: 300 * 64 * 2)  # 256 rows: two panels, the last one short
    panels: list[int] = []
    decode = gpu._Call.decode
    monkeypatch.setattr(
        gpu._Call, "decode", lambda call, first, out: panels.append(len(out)) or decode(call, first, out)
    )
    assert torch.allclose(check(layer, x, 1), whole, rtol=2e-3, atol=2e-3)
    assert panels == [256, 144]


def test_shapes_of_the_input_are_kept_and_nothing_is_nothing(device: torch.device) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g64"), 24, 64, True, device)
    x = random(2, 3, 64).to(device, torch.float16)
    assert torch.equal(run(layer, x).view(6, 24), run(layer, x.view(6, 64)))
    assert torch.equal(run(layer, x.transpose(0, 1)), run(layer, x).transpose(0, 1))
    assert run(layer, x[0, 0]).shape == (24,)
    assert run(layer, x[:0]).shape == (0, 3, 24)


def test_eight_bits_are_left_to_the_reference(device: torch.device) -> None:
    layer = layer_of(parse_scheme("int8-asym-g64"), 24, 128, True, device)
    check(layer, random(3, 128).to(device, torch.float16), 1)


def test_operands_that_do_not_fit_are_refused(device: torch.device) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g64"), 24, 128, False, device)
    with pytest.raises(AfpqError, match=r"qweight .* does not hold 64 codes"):
        run(layer, random(3, 64).to(device, torch.float16))
    layer._buffers["scales_neg"] = layer.scales_neg[:, :1]
    with pytest.raises(AfpqError, match=r"scales_neg is \[24, 1\]"):
        run(layer, random(3, 128).to(device, torch.float16))
    layer._buffers["scales_neg"] = torch.empty(24, 2, dtype=torch.float16, device="meta")
    with pytest.raises(AfpqError, match="scales_neg is on meta"):
        run(layer, random(3, 128).to(device, torch.float16))
    layer = layer_of(parse_scheme("nf4-sym-g64"), 24, 128, False, device)
    with pytest.raises(AfpqError, match="inputs are on meta"):
        run(layer, torch.empty(3, 128, dtype=torch.float16, device="meta"))


def test_without_triton_the_reference_computes_and_says_so_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "afpq.kernels.triton_kernels", None)
    monkeypatch.delattr("afpq.kernels.triton_kernels")
    gpu.kernels.cache_clear()
    try:
        layer = layer_of(parse_scheme("nf4-asym-g64"), 24, 128, False, device)
        x = random(3, 128).to(device, torch.float16)
        with pytest.warns(UserWarning, match="no Triton"):
            check(layer, x, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(layer, x)
    finally:
        gpu.kernels.cache_clear()


# ---- tiles


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu, "_tuned", {})
    yield


def test_autotuning_measures_once_for_each_shape_and_takes_the_fastest(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, untuned: None
) -> None:
    times: list[float] = []

    def pretend(run: Any) -> float | None:
        run()
        times.append(len(times))
        return None if len(times) == 1 else 10.0 - (len(times) == 3)  # the first cannot run, the third is fastest

    monkeypatch.setattr(gpu, "_milliseconds", pretend)
    few = [Tile(64, 16, 32, 4, 2), Tile(64, 16, 64, 4, 3), Tile(128, 16, 64, 4, 3), Tile(128, 16, 32, 4, 3)]
    monkeypatch.setattr(gpu, "candidates", lambda capability, tokens: few)
    monkeypatch.setenv("AFPQ_AUTOTUNE", "1")
    layer = layer_of(parse_scheme("nf4-asym-g64"), 24, 128, False, device)
    for tokens in (1, 16, 2):
        check(layer, random(tokens, 128, seed=3).to(device, torch.float16), 1)
    assert len(times) == len(few)
    assert list(gpu._tuned.values()) == [few[2]]
    check(layer, random(17, 128, seed=3).to(device, torch.float16), 1)  # another size of batch
    assert len(times) == 2 * len(few)


def test_without_autotuning_nothing_is_measured(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, untuned: None
) -> None:
    monkeypatch.setattr(gpu, "_milliseconds", lambda run: pytest.fail("measured"))
    layer = layer_of(parse_scheme("nf4-asym-g64"), 24, 128, False, device)
    check(layer, random(3, 128).to(device, torch.float16), 1)


# ---- what needs a GPU


@gpu_only
def test_the_op_runs_here_and_layers_move_without_changing_a_bit() -> None:
    layer = layer_of(parse_scheme("nf3-asym-g64"), 72, 640, True, torch.device("cuda"))
    x = random(3, 640).to("cuda", torch.float16)
    assert torch.equal(layer(x), run(layer, x))
    before = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    layer.to("cpu").to("cuda").cpu()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.cuda()
    gradient = x.float().requires_grad_()
    layer(gradient).sum().backward()
    assert torch.allclose(gradient.grad, layer.dequantize().sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)


@gpu_only
def test_cuda_graphs_replay_what_was_captured() -> None:
    layer = layer_of(parse_scheme("nf4-asym-g128"), 256, 4096, True, torch.device("cuda"))
    x = random(1, 4096).to("cuda", torch.float16)
    wanted = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, layer(x))


@gpu_only
def test_compiled_with_cuda_graphs() -> None:
    layer = layer_of(parse_scheme("nf4-asym-g128"), 256, 1024, True, torch.device("cuda"))
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    x = random(1, 1024).to("cuda", torch.float16)
    for _ in range(4):
        assert torch.equal(compiled(x).clone(), layer(x))


@gpu_only
def test_streams_side_by_side() -> None:
    layer = layer_of(parse_scheme("nf4-asym-g128"), 128, 8192, False, torch.device("cuda"))
    x = random(1, 8192).to("cuda", torch.float16)
    wanted = layer(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            results.append(layer(x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.parametrize("book", ["lut:-1e5:-0.5:0:0.5:1e5", "lut:-1e-6:-3e-7:0:3e-7:1e-6"])
@pytest.mark.parametrize("tokens", [2, 100])
def test_books_beyond_16_bits_are_not_rounded_to_them(book: str, tokens: int, device: torch.device) -> None:
    layer = layer_of(parse_scheme(f"{book}-asym-g64-float32"), 24, 128, True, device)
    check(layer, random(tokens, 128, seed=3).to(device, torch.float16), 1)


@pytest.mark.parametrize("scheme", ["nf4-asym-g32", "int3-asym-g32"])
def test_scales_of_an_unknown_dtype_go_to_the_reference(scheme: str, device: torch.device) -> None:
    layer = layer_of(parse_scheme(scheme), 8, 64, False, device)
    weight = Packed.from_tensors(layer.packed(), layer.scheme)
    scales = [None if t is None else t.double() for t in (weight.scales, weight.scales_neg)]
    changed = weight._replace(scales=scales[0], scales_neg=scales[1])
    assert torch.float64 not in gpu.FAST_SCALES
    x = random(3, 64).to(device, torch.float16)
    assert torch.equal(gpu.linear(x, changed, None), reference.linear(x, changed, None))
    assert torch.equal(gpu.dequantize(changed, 64, torch.float32), gpu.dequantize(weight, 64, torch.float32))
