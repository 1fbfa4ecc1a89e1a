# SPDX-License-Identifier: MIT
"""The ops compute what the dequantized weight says, with gradients, and torch can trace them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from afpq import kernels
from afpq.algorithms import quantize_rtn
from afpq.kernels import cpu, gpu, reference
from afpq.kernels.kernel import Kernel
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.formats import BITS, FORMATS, custom_format
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import to_tensors
from afpq.numerics.scheme import Scheme, parse_scheme

numeric = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SCHEMES = st.builds(
    Scheme,
    st.sampled_from([*FORMATS.values(), custom_format([-1, -0.5, 0.1, 1])]),
    st.sampled_from([-1, 1, 7, 32, 1000]),
    st.booleans(),
    st.sampled_from(["float16", "float32", "log8"]),
)
KINDS = ["nf3-asym-g32", "nf4-sym-g16", "int4-asym-g32", "int3-sym-g-1", "fp3-asym-g-1-float32", "nf3-asym-g32-log8"]

# Rounding errors, relative to the sum of the magnitudes of what is added up: float32 over up to 100 terms; bfloat16
# rounds the weight, the bias and the result, each to 8 bits.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3 * 2.0**-8, torch.float16: 3 * 2.0**-11}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_operands(weight: QuantizedWeight) -> tuple[Tensor | None, ...]:
    tensors = to_tensors(weight)
    scales = tensors["scales_pos" if weight.scheme.two_scales else "scales"]
    return tensors["qweight"], scales, tensors.get("scales_neg"), tensors.get("zeros"), tensors.get("scale_grid")


def book_operands(scheme: Scheme) -> tuple[list[float], int, int]:
    return list(scheme.format.values), scheme.format.bits, scheme.group_size


def run(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    y: Tensor = kernels.linear(x, *weight_operands(weight), bias, *book_operands(weight.scheme))
    return y


def assert_near_float64(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> None:
    y, exact_weight = run(x, weight, bias), weight.dequantize().double()
    exact_bias = None if bias is None else bias.double()
    exact = torch_linear(x.double(), exact_weight, exact_bias)
    size = torch_linear(x.double().abs(), exact_weight.abs(), None if exact_bias is None else exact_bias.abs())
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= BOUNDS[x.dtype] * size + 1e-7).all())


@numeric
@given(SCHEMES, st.integers(1, 40), st.integers(1, 99), st.integers(1, 5), st.booleans(), st.sampled_from(list(BOUNDS)))
def test_linear_is_the_product_with_the_dequantized_weight(
    scheme: Scheme, out_features: int, in_features: int, tokens: int, with_bias: bool, dtype: torch.dtype
) -> None:
    weight = quantize_rtn(random(out_features, in_features), scheme)
    bias = random(out_features, seed=2).to(dtype) if with_bias else None
    assert_near_float64(random(tokens, in_features, seed=1).to(dtype), weight, bias)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (0,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_batch_dimensions(kind: str, batch: tuple[int, ...]) -> None:
    weight = quantize_rtn(random(6, 50), parse_scheme(kind))
    assert_near_float64(random(*batch, 50), weight, random(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_the_weights_own(kind: str, dtype: torch.dtype) -> None:
    weight = quantize_rtn(random(6, 50), parse_scheme(kind))
    ours = kernels.dequantize(*weight_operands(weight), *book_operands(weight.scheme), 50, dtype)
    assert ours.dtype == dtype and torch.equal(ours, weight.dequantize(dtype))


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_plain_linear(kind: str, batch: tuple[int, ...]) -> None:
    weight = quantize_rtn(random(6, 50), parse_scheme(kind))
    plain = [random(*batch, 50).requires_grad_(), random(6).requires_grad_()]
    ours = [tensor.detach().clone().requires_grad_() for tensor in plain]
    direction = random(*batch, 6, seed=4)
    torch_linear(plain[0], weight.dequantize(), plain[1]).backward(direction)
    run(ours[0], weight, ours[1]).backward(direction)
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one.grad, other.grad)


def test_gradients_reach_the_input_without_a_bias_and_the_bias_alone() -> None:
    weight = quantize_rtn(random(6, 50), parse_scheme("nf3-asym-g32"))
    x = random(4, 50).requires_grad_()
    run(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(4, 50))
    bias = random(6).requires_grad_()
    run(random(4, 50), weight, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((6,), 4.0))


def test_gradients_keep_the_dtype_of_the_input() -> None:
    x = random(4, 50).bfloat16().requires_grad_()
    run(x, quantize_rtn(random(6, 50), parse_scheme("nf3-asym-g32"))).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


# --- tracing


@pytest.mark.parametrize("kind", ["nf3-asym-g32", "int4-asym-g32"])  # with scales_neg, with zeros
def test_torch_accepts_the_ops(kind: str) -> None:
    weight = quantize_rtn(random(6, 50), parse_scheme(kind))
    operands, book = weight_operands(weight), book_operands(weight.scheme)
    for x, bias in ((random(3, 50), None), (random(2, 3, 50).requires_grad_(), random(6).requires_grad_())):
        torch.library.opcheck(kernels.linear.default, (x, *operands, bias, *book))
    torch.library.opcheck(kernels.dequantize.default, (*operands, *book, 50, torch.float32))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["nf3-asym-g32", "int4-asym-g32"])
def test_a_layer_compiles_to_one_graph(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = AfpqLinear.from_weight(quantize_rtn(random(6, 50), parse_scheme(kind)), random(6))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch in ((3,), (5,), (2, 4)):
        x = random(*batch, 50)
        assert torch.equal(compiled(x), layer(x))
    x = random(3, 50).requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 50))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_data(kind: str) -> None:
    scheme = parse_scheme(kind)
    layer = AfpqLinear(50, 6, scheme, bias=True, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        y = layer(torch.empty(2, 3, 50, device="meta", dtype=dtype))
        assert y.device.type == "meta" and y.shape == (2, 3, 6) and y.dtype == dtype
    with torch._subclasses.FakeTensorMode() as mode:
        weight = [mode.from_tensor(t) if t is not None else None for t in layer._scale_buffers()]
        back = kernels.dequantize(mode.from_tensor(layer.qweight), *weight, *book_operands(scheme), 50, torch.float16)
        assert back.shape == (6, 50) and back.dtype == torch.float16


# --- the table


def test_every_device_without_a_row_of_its_own_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(kernels.KERNELS.values()) == [reference, cpu, gpu]
    prepared: list[str] = []
    for key, kernel in kernels.KERNELS.items():
        monkeypatch.setattr(kernel, "prepare", lambda values, bits, device, key=key: prepared.append(key))
    for device in ("cpu", "cuda", "meta", "xpu"):
        kernels.prepare((-1.0, 1.0), 2, torch.device(device))
    assert prepared == ["CPU", "CUDA", "default", "default"]


@pytest.mark.parametrize("kernel", [pytest.param(k, id=key) for key, k in kernels.KERNELS.items()])
def test_any_width_and_scale_dtype_computes(kernel: Kernel, device: torch.device) -> None:
    """The contract of `Kernel`: what is not fast is computed all the same."""
    if kernel is gpu:
        pytest.importorskip("triton")
    x = random(2, 64).to(device)
    for bits in BITS:
        weight = quantize_rtn(random(8, 64), parse_scheme(f"int{bits}-sym-g32"))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            packed = Packed.from_tensors(to_tensors(weight), weight.scheme)
            packed = packed._replace(qweight=packed.qweight.to(device), scales=packed.scales.to(device, dtype))
            wanted = reference.dequantize(packed, 64, torch.float32)
            torch.testing.assert_close(kernel.dequantize(packed, 64, torch.float32), wanted)
            torch.testing.assert_close(kernel.linear(x, packed, None), x @ wanted.T, rtol=1e-4, atol=1e-4)
    assert set(kernel.FAST_BITS) <= set(BITS)
