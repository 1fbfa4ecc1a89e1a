# SPDX-License-Identifier: MIT
"""The end pass: scales, norms and biases of a quantized model tuned together, by gradient, towards the float model.

Layer by layer solvers see one layer's error at a time. At the end all of them can be made up for at once by what is
cheap to change: the codes stay, and every scale, and every vector the model has (weights of norms, biases), is moved
to lower KL(float || quantized) on the calibration text. What is stored costs no bit more.

Every step computes with what would be saved: values are rounded to their storage on the way in, and the gradient is
taken as if they were not. An eighth of the windows only judges: the best values by its KL are kept, the first ones
among them, so the pass never ends worse than it began. Both models are in memory, and one layer's weight unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from afpq.checkpoint.plan import Plan, loaded_bytes, original_bytes, vocabulary
from afpq.errors import AfpqError
from afpq.model.linear import AfpqLinear
from afpq.model.tensor_part import TensorPart
from afpq.numerics.groups import GroupScales, QuantizedWeight, decode
from afpq.numerics.packing import to_tensors
from afpq.numerics.scales import round_to_storage
from afpq.progress import Progress

RATE = 0.004  # of Adam, falling to 0 in a straight line; scales move by ratio, vectors relative to their size
BETAS = (0.9, 0.95)
BATCH_TOKENS = 2048  # of a step
JUDGES = 8  # one window in so many judges
LOOKS = 4  # times it is judged on the way


@dataclass(frozen=True)
class EndPass:
    """Steps of the end pass, the judging windows' KL before and with what was kept, and the step that was kept at."""

    steps: int
    kl_before: float
    kl_after: float
    kept_step: int
    training_windows: int
    judging_windows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Rounded(torch.autograd.Function):
    """(exact, rounded) -> rounded, whose gradient goes to exact as if it had not been rounded."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _rounded(exact: Tensor, rounded: Tensor) -> Tensor:
    # torch has no types for apply: it takes what forward takes
    result: Tensor = _Rounded.apply(exact, rounded.detach().float())  # type: ignore[no-untyped-call]
    return result


class _Scales:
    """A layer's scales [out, groups] times exp(moves); the moves, one tensor a side, are what is tuned."""

    def __init__(self, layer: AfpqLinear) -> None:
        weight = layer.quantized_weight()
        self.weight, scales = weight, weight.scales
        sides = [scales.pos, scales.neg] if weight.scheme.two_scales else [scales.pos]
        self.sides = [side.float() for side in sides]
        self.moves = [torch.zeros_like(side, requires_grad=True) for side in self.sides]

    def rounded(self) -> GroupScales:
        """As they would be saved, signs kept."""
        sizes = [side.abs() * move.exp() for side, move in zip(self.sides, self.moves)]
        saved = [_rounded(size, round_to_storage(size.detach(), self.weight.scheme, saturate=True)) for size in sizes]
        signed = [size * side.sign() for size, side in zip(saved, self.sides)]
        return GroupScales(signed[0], signed[-1], self.weight.scales.zero)

    def matrix(self) -> Tensor:
        """[out, in] float32, differentiable in the moves."""
        scheme = self.weight.scheme
        codes = self.weight.codes
        return decode(codes, self.rounded(), scheme.format.values, scheme.span(codes.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The saved tensors of the scales as they are now."""
        with torch.no_grad():
            new, old = self.rounded(), self.weight
            pos, neg = (side.to(old.scales.pos.dtype) for side in (new.pos, new.neg))
            found = to_tensors(QuantizedWeight(old.codes, GroupScales(pos, neg, new.zero), old.scheme))
        return {name: tensor for name, tensor in found.items() if name.startswith("scales")}


class _Vector:
    """A parameter of one dimension plus `move` times its size; saved in `dtype`, whatever the model computes in."""

    def __init__(self, value: Tensor, dtype: torch.dtype) -> None:
        self.value, self.computed, self.dtype = value.detach().float(), value.dtype, dtype
        self.size = max(self.value.square().mean().sqrt().item(), 1e-3)
        self.move = torch.zeros_like(self.value, requires_grad=True)

    def rounded(self) -> Tensor:
        exact = self.value + self.size * self.move
        return _rounded(exact, exact.to(self.dtype)).to(self.computed)


class _Tuned:
    """All that is tuned of a model: scales by module, vectors by parameter name."""

    def __init__(self, model: nn.Module, vectors: dict[str, torch.dtype]) -> None:
        self.model = model
        layers = {name: m for name, m in model.named_modules() if isinstance(m, AfpqLinear)}
        self.scales = {name: _Scales(layer) for name, layer in layers.items()}
        parameters = dict(model.named_parameters())
        self.vectors = {
            name: _Vector(parameters[name], dtype)
            for name, dtype in vectors.items()
            if name in parameters and parameters[name].dim() == 1 and parameters[name].is_floating_point()
        }

    def moves(self) -> list[Tensor]:
        return [m for s in self.scales.values() for m in s.moves] + [v.move for v in self.vectors.values()]

    def logits(self, ids: Tensor) -> Tensor:
        vectors = {name: vector.rounded() for name, vector in self.vectors.items()}
        with self._differentiable():
            result = functional_call(self.model, vectors, (ids,), {"use_cache": False})
        return result.logits.float()  # type: ignore[no-any-return]

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        """Inside, quantized layers unpack their weights with the tuned scales, once more for the gradient."""

        def replacement(layer: nn.Module, scales: _Scales) -> Callable[[Tensor], Tensor]:
            def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
                return linear(x, scales.matrix().to(x.dtype), None if bias is None else bias.to(x.dtype))

            # The bias is read now: it is one that is tuned only while the model runs, not when its gradient is taken.
            return lambda x: checkpoint(multiply, x, layer.bias, use_reentrant=False)

        layers = {name: self.model.get_submodule(name) for name in self.scales}
        try:
            for name, layer in layers.items():
                layer.forward = replacement(layer, self.scales[name])
            yield
        finally:
            for layer in layers.values():
                del layer.forward


def vector_places(plan: Plan) -> dict[str, str]:
    """Name in the model -> name in the files, of what is saved as the model has it; tune_end picks the vectors."""
    replaced = {tensor for unit in plan.units for tensor in unit.replaced}
    kept = {name: s.tensor for name, s in plan.names.items() if s == TensorPart(s.tensor) and s.tensor not in replaced}
    return kept | {piece.name: piece.output for unit in plan.units for piece in unit.pieces}


def end_pass_bytes(plan: Plan) -> int:
    """Memory of both models, of the codes a byte each, and of a step's logits."""
    codes, logits = sum(t.elements for t in plan.targets), 6 * 4 * vocabulary(plan) * BATCH_TOKENS
    return original_bytes(plan) + loaded_bytes(plan) + codes + logits


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(reference || logits) of a token, from logits [..., vocabulary]."""
    p, q = reference.float().log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def run_end_pass(
    model: nn.Module, original: nn.Module, windows: Tensor, steps: int, seed: int, vectors: dict[str, torch.dtype],
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], EndPass]:  # fmt: skip
    """A quantized model and its float original, on one device, windows of tokens [count, length] -> what to save:
    module -> its scale tensors, and name -> vector; empty where nothing became better.

    `vectors` names parameters that may be tuned, and the dtype each is saved in. Raises AfpqError for fewer than two
    windows, and where the model's outputs are NaN or Inf.
    """
    if len(windows) < 2:
        raise AfpqError("the end pass needs 2 windows, to learn from and to judge by: more --samples or text")
    windows = windows.to(next(original.parameters()).device)
    judges = torch.arange(len(windows)) % min(JUDGES, len(windows)) == 0
    judging, training = windows[judges], windows[~judges]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tuned = _Tuned(model, vectors)
    moves = tuned.moves()
    best = [move.detach().clone() for move in moves]
    before = lowest = _judge(tuned, original, judging)
    optimizer = torch.optim.Adam(moves, lr=RATE, betas=BETAS)
    kept = 0
    for step, ids in enumerate(_batches(training, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        with torch.no_grad():
            reference = _logits(original, ids)
        optimizer.zero_grad()
        kl(reference, tuned.logits(ids)).backward()
        optimizer.step()
        if (step + 1) * LOOKS // steps > step * LOOKS // steps:
            found = _judge(tuned, original, judging)
            if found < lowest:
                lowest, kept, best = found, step + 1, [move.detach().clone() for move in moves]
        if progress is not None:
            progress("end pass", step + 1, steps)
    with torch.no_grad():
        for move, value in zip(moves, best):
            move.copy_(value)
    told = EndPass(steps, before, lowest, kept, len(training), len(judging))
    if not kept:
        return {}, {}, told
    scales = {name: layer.tensors() for name, layer in tuned.scales.items()}
    return scales, {name: v.rounded().detach().to(v.dtype) for name, v in tuned.vectors.items()}, told


def _logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


@torch.no_grad()
def _judge(tuned: _Tuned, original: nn.Module, windows: Tensor) -> float:
    """Mean KL over the windows. Raises AfpqError where it is not finite.

    The original's logits are computed anew each time: those of a few windows of a large vocabulary are gigabytes.
    """
    losses = [kl(_logits(original, w), tuned.logits(w)).item() for w in windows.split(1)]
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise AfpqError("the end pass: the model's outputs are NaN or Inf on the calibration text")
    return mean


def _batches(windows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """For each step some windows, all of them once before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(len(windows), max(1, BATCH_TOKENS // windows.shape[1]))
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(len(windows), generator=generator).tolist()
        yield windows[[left.pop() for _ in range(size)]]
