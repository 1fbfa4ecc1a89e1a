# SPDX-License-Identifier: MIT
"""A stand-in answers what it can without values, and computes as the tensor itself with them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afpq.algorithms import quantize_rtn
from afpq.model.linear import AfpqLinear
from afpq.model.weight_stand_in import WeightStandIn
from afpq.numerics.scheme import parse_scheme

VALUES = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))


class Counted:
    """A tensor to decode, and how often that was done."""

    def __init__(self, values: Tensor = VALUES) -> None:
        self.values, self.decodes = values, 0
        self.tensor = WeightStandIn(self.decode, values.shape, values.dtype, values.device)

    def decode(self) -> Tensor:
        self.decodes += 1
        return self.values


WITHOUT_VALUES: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda w: isinstance(w, Tensor),
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0), w.dim(), w.ndim, w.numel(), len(w)),
    "dtype": lambda w: (w.dtype, w.is_floating_point(), torch.is_floating_point(w), w.element_size(), w.itemsize),
    "device": lambda w: (w.device, w.is_cuda, w.is_meta, w.get_device()),
    "gradient": lambda w: (w.requires_grad, w.grad, w.is_leaf),
    "is_tensor": torch.is_tensor,
    "hash": lambda w: hash(w) == hash(w),
}


@pytest.mark.parametrize("what", WITHOUT_VALUES)
def test_what_needs_no_values_decodes_nothing(what: str) -> None:
    counted = Counted()
    assert WITHOUT_VALUES[what](counted.tensor) == WITHOUT_VALUES[what](VALUES)
    assert counted.decodes == 0


X = torch.ones(50)
USES: dict[str, Callable[[Any], Any]] = {
    "product": lambda w: w @ X,
    "product from the left": lambda w: torch.ones(6) @ w,
    "linear": lambda w: nn.functional.linear(X, w),
    "indexing": lambda w: w[1:3, ::2],
    "transposed": lambda w: w.T,
    "cast": lambda w: w.to(torch.bfloat16),
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "in a list": lambda w: torch.cat([w, w]),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "parameter": lambda w: nn.Parameter(w.clone(), requires_grad=False).data,
    "deep copy": deepcopy,
    "sum": lambda w: w.abs().sum(),
    "keyword": lambda w: torch.matmul(input=w, other=X),
    "below Python": lambda w: torch._C._nn.linear(X, w),
}


@pytest.mark.parametrize("use", USES)
def test_what_needs_values_gets_those_of_the_tensor(use: str) -> None:
    counted = Counted()
    found = USES[use](counted.tensor)
    assert type(found) is Tensor and torch.equal(found, USES[use](VALUES))
    assert counted.decodes >= 1


def test_gradients_pass_through_a_product() -> None:
    x = torch.ones(50, requires_grad=True)
    (Counted().tensor @ x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, VALUES.sum(0))


def test_a_layers_weight_is_decoded_once_for_each_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AfpqLinear.from_weight(quantize_rtn(VALUES, parse_scheme("nf4-asym-g32")), dtype=torch.bfloat16)
    wanted, decodes, dequantize = layer.dequantize(torch.bfloat16), [], AfpqLinear.dequantize

    def counted(self: AfpqLinear, dtype: torch.dtype = torch.float32) -> Tensor:
        decodes.append(self)
        return dequantize(self, dtype)

    monkeypatch.setattr(AfpqLinear, "dequantize", counted)
    weight = layer.weight
    assert hasattr(layer, "weight") and isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device) == (torch.bfloat16, (6, 50), torch.device("cpu"))
    assert decodes == []
    assert torch.equal(weight + 0, wanted) and torch.equal(weight.T, wanted.T) and len(decodes) == 1
    assert "weight" not in dict(deepcopy(layer).named_parameters()) and len(decodes) == 1
    layer.conv1d = True
    assert layer.weight.shape == (50, 6) and torch.equal(layer.weight + 0, wanted.T)


def test_a_compiled_model_reads_a_weight_without_a_graph_break() -> None:
    layer = AfpqLinear.from_weight(quantize_rtn(VALUES, parse_scheme("int4-asym-g32-log8")))

    def both(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype)) + x @ layer.weight.T

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), both(X))
