# SPDX-License-Identifier: MIT
"""The native CPU kernels: every instruction set of this machine against float64, within stated bounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.kernels import cpu, reference, set_compute
from afpq.kernels.arithmetic import MODES
from afpq.kernels.cpu_library import ISAS, native
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.formats import FORMATS, custom_format
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme, parse_scheme

NARROW = [f for f in FORMATS.values() if f.bits in cpu.FAST_BITS]
ODD_BOOKS = [custom_format([-3.0, -0.2, -0.1, 0.0, 0.5, 1.0]), custom_format([-0.25, 0.5, 1.0])]
SCHEMES = st.builds(
    Scheme,
    st.sampled_from([*NARROW, *ODD_BOOKS]),
    st.sampled_from([-1, 32, 64, 96, 128, 160, 256, 1000, 40, 7]),  # the last two are for portable code
    st.booleans(),
    st.sampled_from(["float16", "float32", "log8"]),
)
# Float32 sums of n terms in 8 or more parts: far below n * 2^-24; a factor of 10 over the worst seen.
EXACT = 1e-6
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Tests change the instruction set and the arithmetic of the process."""
    library = native()
    if library is None:
        pytest.skip("the native library is not built")
    isa, mode = library.isa, set_compute("exact")
    yield
    library.select(isa)
    set_compute(mode)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    library = native()
    if library is None or not library.select(request.param):
        pytest.skip(f"{request.param} cannot run here")
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(scheme: Scheme, rows: int, columns: int, bias: bool = False, seed: int = 0) -> AfpqLinear:
    weight = random(rows, columns, seed=seed) * random(rows, 1, seed=seed + 1).exp()
    weight[0] = weight[0].abs()  # one-sided groups
    return AfpqLinear.from_weight(quantize_rtn(weight, scheme), random(rows, seed=seed) if bias else None)


def size_of(layer: AfpqLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """(exact outputs, sums of the magnitudes added up), float64."""
    W, bias = layer.dequantize().double(), 0.0 if layer.bias is None else layer.bias.double()
    x = x.double()
    return x @ W.T + bias, x.abs() @ W.abs().T + abs(bias)


SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 5, 6, 7, 13, cpu.MANY_TOKENS]))


# No fixture: hypothesis would share one function-scoped fixture among examples.
@settings(max_examples=200)
@given(SCHEMES, SHAPES, st.booleans(), st.sampled_from(list(EPS)), st.sampled_from(ISAS))
def test_exact_arithmetic_equals_float64(
    scheme: Scheme, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype, name: str
) -> None:
    library = native()
    assert library is not None
    if not library.select(name):
        return
    rows, columns, tokens = shape
    layer, x = layer_of(scheme, rows, columns, bias), random(tokens, columns).to(dtype)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    wanted, size = size_of(layer, x)
    result = layer(x)
    assert result.dtype == dtype
    # AMX rounds weights to bfloat16, as torch's own bfloat16 product does.
    rounding = EPS[torch.bfloat16] if name == "amx" and dtype == torch.bfloat16 else 0
    assert ((result.double() - wanted).abs() <= (EXACT + rounding) * size + EPS[dtype] * wanted.abs()).all()


@settings(max_examples=150)
@given(SCHEMES, SHAPES, st.sampled_from(ISAS))
def test_int8_errors_are_those_of_its_steps(scheme: Scheme, shape: tuple[int, int, int], name: str) -> None:
    """Inputs: half a step of max|x| / 127 for each 128. Weights: half a step of the group's largest |w|, divided by 32
    to 63, whichever suits the code book best, and an eighth to a quarter of it for the ratio of the two scales, which
    is rounded to 1/127: 1.26 / 63 at most; none for integers with zero points."""
    library = native()
    assert library is not None
    if not library.select(name):
        return
    rows, columns, tokens = shape
    layer, x = layer_of(scheme, rows, columns), random(tokens, columns)
    set_compute("int8")
    result = layer(x)
    W, span = layer.dequantize().double(), scheme.span(columns)
    book = max(abs(v) for v in scheme.format.values)
    scales = layer.quantized_weight().scales
    largest = torch.maximum(scales.pos, scales.neg).double().repeat_interleave(span, 1)[:, :columns] * book
    steps = torch.nn.functional.pad(x, (0, -columns % 128)).unflatten(1, (-1, 128)).abs().amax(-1) / 127
    step_x = steps.double().repeat_interleave(128, 1)[:, :columns]
    step_w = torch.zeros_like(largest) if scheme.zero_point else 1.26 * largest / 63
    bound = 0.5 * step_x @ (W.abs() + step_w).T + x.double().abs() @ step_w.T
    wanted, size = size_of(layer, x)
    assert ((result.double() - wanted).abs() <= 1.001 * bound + 1e-5 * size).all()


@pytest.mark.parametrize("scheme", ["nf4-asym-g128", "nf3-sym-g64", "nf3-asym-g32", "int4-asym-g32", "fp4-asym-g40"])
def test_dequantize_equals_the_reference(isa: str, scheme: str) -> None:
    for rows, columns in ((5, 30), (33, 256), (8, 500)):
        layer = layer_of(parse_scheme(scheme), rows, columns)
        book = layer.scheme.format
        for dtype in EPS:
            operands = (layer.qweight, *layer._scale_buffers(), book.values, book.bits, layer.scheme.group_size)
            native = torch.ops.afpq.dequantize(*operands, columns, dtype)
            assert native.dtype == dtype
            torch.testing.assert_close(native, layer.dequantize(dtype), rtol=EPS[dtype], atol=0)


def test_int8_is_for_few_tokens_and_finite_inputs(isa: str) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g128"), 16, 256)
    few, many = random(6, 256), random(7, 256)
    exact = layer(few), layer(many)
    assert set_compute("int8") == "exact"
    assert torch.equal(layer(many), exact[1])
    assert torch.equal(layer(few), exact[0]) == (isa == "portable")
    few[2, 3], few[4, 5] = float("nan"), float("inf")
    assert layer(few)[2].isnan().all() and not layer(few)[4].isfinite().any()
    assert layer(torch.zeros(1, 256)).eq(0).all()


def test_extreme_inputs(isa: str) -> None:
    layer = layer_of(parse_scheme("nf3-asym-g32"), 8, 128)
    for mode in MODES:
        set_compute(mode)
        for scale in (1e-42, 1e-30, 1e30):
            x = random(2, 128) * scale
            wanted, size = size_of(layer, x)
            assert ((layer(x).double() - wanted).abs() <= 0.1 * size + 1e-35).all()


def test_any_shape_of_input(isa: str) -> None:
    layer = layer_of(parse_scheme("nf4-asym-g32"), 12, 64, bias=True)
    x = random(2, 3, 64)
    wanted = layer(x.view(6, 64)).view(2, 3, 12)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x.transpose(0, 1)), wanted.transpose(0, 1))
    assert layer(x[0, 0]).shape == (12,)
    assert layer(x[:0]).shape == (0, 3, 12)


def test_threads_of_torch_give_the_same_result() -> None:
    layer = layer_of(parse_scheme("nf4-asym-g128"), 1024, 1024)
    x, before = random(3, 1024), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_many_threads_may_call_at_once() -> None:
    layer = layer_of(parse_scheme("nf3-asym-g64"), 64, 256)
    inputs = [random(n % 8 + 1, 256, seed=n) for n in range(16)]
    wanted, wrong = [layer(x) for x in inputs], []

    def work(n: int) -> None:
        for _ in range(50):
            if not torch.equal(layer(inputs[n]), wanted[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_strided_tensors_and_other_widths_go_to_the_reference() -> None:
    layer = layer_of(parse_scheme("nf4-asym-g32"), 8, 64)
    x = random(2, 64)
    wanted = layer(x)
    layer._buffers["qweight"] = layer.qweight.repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(layer(x), wanted)
    eight = layer_of(parse_scheme("int8-sym-g32"), 8, 64)
    torch.testing.assert_close(eight(x), x @ eight.dequantize().T)
    torch.testing.assert_close(layer(x.double()), x.double() @ layer.dequantize(torch.float64).T)


def test_rounding_to_half_types_equals_torch(isa: str) -> None:
    """Identity weights, so that the result is the input rounded: every float16 and bfloat16 that is finite.

    AMX multiplies in bfloat16, and its instruction counts numbers below the smallest normal one as zero: exactly those
    become 0, all others stay as they are.
    """
    scheme = Scheme(custom_format([-1.0, 0.0, 1.0]), -1, True, "float32")
    layer = AfpqLinear.from_weight(
        QuantizedWeight(torch.eye(32).to(torch.uint8) + 1, quantize_rtn(torch.eye(32), scheme).scales, scheme)
    )
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = torch.where(every.isfinite(), every, 0).view(-1, 32)
        flushed = isa == "amx" and dtype == torch.bfloat16
        wanted = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x) if flushed else x
        for rows, expected in zip(x.split(64), wanted.split(64)):
            assert torch.equal(layer(rows), expected)
        for rows in x[::16].split(4):  # few tokens are multiplied in float32, which has these numbers
            assert torch.equal(layer(rows), rows)


def test_sums_below_the_smallest_normal_number_become_zero_with_amx_alone(isa: str) -> None:
    """1.5 * 2^-126 - 2^-126: both are normal, their difference is not."""
    scheme = Scheme(custom_format([-1.0, 1.0]), -1, True, "float32")
    layer = AfpqLinear.from_weight(quantize_rtn(torch.tensor([[1.0, -1.0]]).repeat(4, 1), scheme))
    x = torch.tensor([[1.5, 1.0]]).repeat(8, 1).bfloat16() * 2.0**-126
    assert layer(x).float().unique().tolist() == [0.0 if isa == "amx" else 2.0**-127]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_scales_of_an_unknown_dtype_go_to_the_reference(isa: str, dtype: torch.dtype) -> None:
    """Also negative ones and those of zero points, for both ops."""
    assert dtype not in cpu.FAST_SCALES
    for scheme in ("nf4-asym-g32", "int3-asym-g32", "nf2-sym-g-1"):
        layer, x = layer_of(parse_scheme(scheme), 8, 64), random(2, 64)
        weight = Packed.from_tensors(layer.packed(), layer.scheme)
        scales = [None if t is None else t.to(dtype) for t in (weight.scales, weight.scales_neg)]
        changed = weight._replace(scales=scales[0], scales_neg=scales[1])
        rounded = weight._replace(**{
            name: None if t is None else t.float() for name, t in zip(("scales", "scales_neg"), scales)
        })  # fmt: skip
        assert torch.equal(cpu.linear(x, changed, None), reference.linear(x, changed, None))
        torch.testing.assert_close(cpu.linear(x, changed, None), cpu.linear(x, rounded, None))
        torch.testing.assert_close(
            cpu.dequantize(changed, 64, torch.float32), cpu.dequantize(rounded, 64, torch.float32)
        )
