# SPDX-License-Identifier: MIT
"""What the end pass tunes: the scales and vectors of a quantized model, differentiable and rounded as they are saved.

Values are rounded to their storage on the way in, and the gradient passes through as if they were not (a
straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from afpq.model.blocks import replaced_forwards
from afpq.model.embedding import AfpqTiedHead
from afpq.model.linear import AfpqLinear
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, decode
from afpq.numerics.packing import to_tensors
from afpq.numerics.scales import round_to_storage


class _StraightThrough(torch.autograd.Function):
    """A straight-through estimator: (exact, rounded) -> rounded, whose gradient goes to exact."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    # torch has no types for apply: it takes what forward takes
    result: Tensor = _StraightThrough.apply(exact, rounded.detach().float())  # type: ignore[no-untyped-call]
    return result


class TunedScales:
    """A layer's scales [out, groups] times exp(moves); the moves, one tensor per side, are tuned."""

    def __init__(self, layer: AfpqLinear) -> None:
        weight = layer.quantized_weight()
        self.weight, scales = weight, weight.scales
        sides = [scales.pos, scales.neg] if weight.scheme.two_scales else [scales.pos]
        self.sides = [side.float() for side in sides]
        self.moves = [torch.zeros_like(side, requires_grad=True) for side in self.sides]

    def rounded(self) -> GroupScales:
        """Return the scales as they would be saved, with their signs."""
        sizes = [side.abs() * move.exp() for side, move in zip(self.sides, self.moves)]
        saved = [
            _straight_through(size, round_to_storage(size.detach(), self.weight.fitted, saturate=True))
            for size in sizes
        ]
        signed = [size * side.sign() for size, side in zip(saved, self.sides)]
        return replace(self.weight.scales, pos=signed[0], neg=signed[-1])

    def matrix(self) -> Tensor:
        """Return the weight [out, in] in float32, differentiable in the moves."""
        scheme = self.weight.scheme
        codes = self.weight.codes
        return decode(codes, self.rounded(), scheme.format.values, scheme.span(codes.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save for the current scales."""
        with torch.no_grad():
            dtype = self.weight.scales.pos.dtype
            new = self.rounded().map(lambda side: side.to(dtype))
            found = to_tensors(QuantizedWeight(self.weight.codes, new, self.weight.scheme))
        return {name: tensor for name, tensor in found.items() if name.startswith("scales")}


class TunedVector:
    """A one-dimensional parameter plus `move` times its size; saved in `dtype`, whatever the model computes in."""

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        self.value, self.computed, self.dtype = value.detach().float(), value.dtype, dtype
        self.size = max(self.value.square().mean().sqrt().item(), 1e-3)
        self.move = torch.zeros_like(self.value, requires_grad=True)

    def rounded(self) -> Tensor:
        """Return the vector rounded to `dtype`, in the dtype the model computes in."""
        exact = self.value + self.size * self.move
        return _straight_through(exact, exact.to(self.dtype)).to(self.computed)


class TunedValues:
    """The tuned values of a model: scales by module, vectors by parameter name."""

    def __init__(self, model: nn.Module, vectors: dict[str, torch.dtype]) -> None:
        self.model = model
        modules = model.named_modules()  # not a tied head: the embedding, which stays as it is, reads the same scales
        layers = {name: m for name, m in modules if isinstance(m, AfpqLinear) and not isinstance(m, AfpqTiedHead)}
        self.scales = {name: TunedScales(layer) for name, layer in layers.items()}
        parameters = dict(model.named_parameters())
        self.vectors = {
            name: TunedVector(parameters[name], dtype)
            for name, dtype in vectors.items()
            if name in parameters and parameters[name].dim() == 1 and parameters[name].is_floating_point()
        }

    def moves(self) -> list[Tensor]:
        """Return the tensors that the optimizer changes."""
        return [m for s in self.scales.values() for m in s.moves] + [v.move for v in self.vectors.values()]

    def logits(self, ids: Tensor) -> Tensor:
        """Run the model with its tuned values on tokens [windows, length]; float32 logits."""
        vectors = {name: vector.rounded() for name, vector in self.vectors.items()}
        with self._differentiable():
            result = functional_call(self.model, vectors, (ids,), {"use_cache": False})
        return result.logits.float()  # type: ignore[no-any-return]

    def _differentiable(self) -> AbstractContextManager[None]:
        """Inside, quantized layers unpack their weights with the tuned scales, and again for the gradient."""

        def replacement(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
            scales = self.scales[name]

            def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
                return linear(x, scales.matrix().to(x.dtype), None if bias is None else bias.to(x.dtype))

            # The bias is read here: `functional_call` provides the tuned one only while the model runs.
            return lambda x: checkpoint(multiply, x, layer.bias, use_reentrant=False)

        layers = [(name, self.model.get_submodule(name)) for name in self.scales]
        return replaced_forwards(layers, replacement)
