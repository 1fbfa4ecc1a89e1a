# SPDX-License-Identifier: MIT
"""AfpqLinear computes with its stored weight, saves and loads it bit by bit, and lets gradients through."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.model.linear import AfpqLinear
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import layout
from afpq.numerics.scheme import parse_scheme

KINDS = ["nf3-asym-g32", "nf4-sym-g16", "int4-asym-g32", "int3-sym-g-1", "fp3-asym-g-1-float32"]
OUT, IN = 6, 50


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(kind: str = "nf3-asym-g32") -> QuantizedWeight:
    return quantize_rtn(random(OUT, IN), parse_scheme(kind))


def make_layer(kind: str = "nf3-asym-g32", bias: bool = True) -> AfpqLinear:
    return AfpqLinear.from_weight(make_weight(kind), random(OUT, seed=1) if bias else None)


def assert_same_buffers(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_a_linear_with_the_dequantized_weight(kind: str) -> None:
    layer, x = make_layer(kind), random(3, 2, IN)
    expected = nn.functional.linear(x, make_weight(kind).dequantize(), random(OUT, seed=1))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(make_layer(kind, bias=False)(x), expected - random(OUT, seed=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_is_exactly_the_quantized_weights(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind)
    assert torch.equal(layer.dequantize(dtype), make_weight(kind).dequantize(dtype))
    assert torch.equal(layer.quantized_weight().codes, make_weight(kind).codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    y = make_layer()(random(3, IN).to(dtype))
    assert y.dtype == dtype and y.shape == (3, OUT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_layout_and_the_bias(kind: str, bias: bool) -> None:
    state = make_layer(kind, bias).state_dict()
    announced = layout(parse_scheme(kind), OUT, IN)
    assert state.keys() == announced.keys() | ({"bias"} if bias else set())
    assert {name: (state[name].dtype, tuple(state[name].shape)) for name in announced} == announced


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loading_a_state_dict_gives_the_layer_back(kind: str, assign: bool, tmp_path: Path) -> None:
    layer, empty = make_layer(kind), AfpqLinear(IN, OUT, parse_scheme(kind), bias=True)
    torch.save(layer.state_dict(), tmp_path / "state")
    empty.load_state_dict(torch.load(tmp_path / "state"), assign=assign)
    assert_same_buffers(empty, layer)
    assert torch.equal(empty(random(3, IN)), layer(random(3, IN)))


def test_an_empty_layer_can_start_on_meta() -> None:
    layer, empty = make_layer(), AfpqLinear(IN, OUT, parse_scheme("nf3-asym-g32"), bias=True, device="meta")
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert_same_buffers(empty, layer)


@pytest.mark.parametrize(
    ("kind", "name", "dtype"),
    [
        ("nf3-asym-g32", "qweight", torch.int32),
        ("nf3-asym-g32", "scales_pos", torch.bfloat16),
        ("nf3-asym-g32", "scales_neg", torch.float32),
        ("nf4-sym-g16", "scales", torch.float32),
        ("int4-asym-g32", "zeros", torch.int8),
        ("fp3-asym-g-1-float32", "scales_pos", torch.float16),
    ],
)
def test_a_tensor_of_another_dtype_is_refused_by_name(kind: str, name: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), make_layer(kind))
    state = model.state_dict()
    state[f"1.{name}"] = state[f"1.{name}"].to(dtype)
    with pytest.raises(AfpqError, match=rf"1\.{name}"):
        model.load_state_dict(state)


def test_a_missing_or_misshapen_tensor_is_refused() -> None:
    layer = make_layer()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="scales_neg"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "scales_neg"})
    with pytest.raises(RuntimeError, match="scales_neg"):
        layer.load_state_dict({**state, "scales_neg": state["scales_neg"][:, :1]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_casting_leaves_scales_alone_and_casts_the_bias(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind)
    nn.Sequential(layer).to(dtype)
    assert_same_buffers(layer, make_layer(kind))
    assert layer.bias is not None and layer.bias.dtype == dtype
    assert torch.equal(layer.dequantize(), make_weight(kind).dequantize())


def test_half_and_back_changes_nothing_but_the_bias() -> None:
    layer = make_layer("fp3-asym-g-1-float32").half().float()
    assert_same_buffers(layer, make_layer("fp3-asym-g-1-float32"))
    assert layer.bias is not None and torch.equal(layer.bias, random(OUT, seed=1).half().float())


def test_moving_to_a_device_moves_everything() -> None:
    layer = make_layer().to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert {name: t.dtype for name, t in layer.named_buffers()} == {
        name: t.dtype for name, t in make_layer().named_buffers()
    }


def test_a_deep_copy_shares_nothing() -> None:
    layer = make_layer()
    copy = deepcopy(layer)
    assert_same_buffers(copy, layer)
    assert torch.equal(copy(random(3, IN)), layer(random(3, IN)))
    copy.qweight.zero_()
    assert_same_buffers(layer, make_layer())


def test_the_bias_is_a_copy_that_needs_no_gradient() -> None:
    bias = random(OUT)
    layer = AfpqLinear.from_weight(make_weight(), bias)
    bias.zero_()
    assert layer.bias is not None and torch.equal(layer.bias, random(OUT)) and not layer.bias.requires_grad


@pytest.mark.parametrize("width", [IN - 1, IN + 1, 1])
def test_an_input_of_another_width_is_an_error(width: int) -> None:
    with pytest.raises(AfpqError, match=rf"{width}\D.*{IN}"):
        make_layer()(random(2, width))


@pytest.mark.parametrize("kind", KINDS)
def test_printing_shows_the_scheme(kind: str) -> None:
    text = repr(make_layer(kind))
    assert f"scheme={kind}" in text and f"in_features={IN}" in text and f"out_features={OUT}" in text


def test_what_follows_learns() -> None:
    layer, before = make_layer(), make_layer()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(OUT, 1))
    x, target = random(16, IN), random(16, 1, seed=5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert_same_buffers(layer, before)
    assert layer.bias is not None and torch.equal(layer.bias, random(OUT, seed=1))


def test_what_precedes_gets_the_gradient_of_a_plain_linear() -> None:
    first, layer = nn.Linear(IN, IN), make_layer()
    plain = nn.Linear(IN, OUT)
    plain.weight.data, plain.bias.data = layer.dequantize(), random(OUT, seed=1)
    x = random(4, IN)
    gradients = []
    for second in (layer, plain):
        first.zero_grad()
        second(first(x).tanh()).square().sum().backward()
        assert first.weight.grad is not None
        gradients.append(first.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "name", "value"),
    [
        ("nf4-asym-g32", "scales_neg", math.nan),
        ("nf4-sym-g32-float32", "scales", math.inf),
        ("nf4-asym-g32-log8", "scale_grid", math.nan),
        ("nf4-asym-g32-log8", "scale_grid", 200.0),  # 2^200 is no float32
    ],
)
def test_scales_that_are_no_numbers_are_refused(scheme: str, name: str, value: float) -> None:
    layer = AfpqLinear(64, 8, parse_scheme(scheme))
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state[name].view(-1)[0] = value
    with pytest.raises(AfpqError, match=name):
        layer.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), AfpqLinear(64, 8, layer.scheme).buffers())
    )


@pytest.mark.parametrize("value", [None, 3, "x", [1.0]])
def test_what_is_no_tensor_is_refused_by_name(value: object) -> None:
    layer = AfpqLinear(64, 8, parse_scheme("nf4-asym-g32"))
    with pytest.raises(RuntimeError, match="scales_pos"):
        layer.load_state_dict({**layer.state_dict(), "scales_pos": value})
