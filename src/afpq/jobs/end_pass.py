# SPDX-License-Identifier: MIT
"""The end pass: scales, norms and biases of a quantized model tuned together, by gradient, towards the float model.

Layer-by-layer solvers reduce one layer's error at a time. At the end all errors are compensated at once by what is
cheap to change: the codes stay, and every scale and every vector of the model (weights of norms, biases) moves to lower
KL(float || quantized) on the calibration text. The result needs no extra bits.

Every step computes with the values as they would be saved (`tuned_values.py`). One eighth of the windows is held out to
pick the best step by its KL, the start included, so the pass never ends worse than it began. Both models are in memory,
with one layer's weight unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.checkpoint.plan import Plan, loaded_bytes, original_bytes, vocabulary
from afpq.errors import AfpqError, named_lack_of_memory
from afpq.jobs.tuned_values import TunedValues
from afpq.model.tensor_part import TensorPart
from afpq.progress import Progress

RATE = 0.004  # of Adam, falling to 0 in a straight line; scales move by ratio, vectors relative to their size
BETAS = (0.9, 0.95)
STEP_TOKENS = 2048
HELD_OUT_ONE_IN = 8  # windows
EVALUATIONS = 4  # on the held-out windows, in the course of the steps


@dataclass(frozen=True)
class EndPass:
    """The result of an end pass: its steps, the KL of the held-out windows before and after, and the step kept."""

    steps: int
    kl_before: float
    kl_after: float
    kept_step: int
    training_windows: int
    judging_windows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def vector_places(plan: Plan) -> dict[str, str]:
    """Map names in the model to names in files, for tensors saved as the model has them; run_end_pass picks vectors."""
    replaced = {tensor for unit in plan.units for tensor in unit.replaced}
    kept = {name: s.tensor for name, s in plan.names.items() if s == TensorPart(s.tensor) and s.tensor not in replaced}
    return kept | {piece.name: piece.output for unit in plan.units for piece in unit.pieces}


def end_pass_bytes(plan: Plan) -> int:
    """Return the bytes of both models, of the codes with a byte each, and of a step's logits."""
    codes, logits = sum(t.elements for t in plan.targets), 6 * 4 * vocabulary(plan) * STEP_TOKENS
    return original_bytes(plan) + loaded_bytes(plan) + codes + logits


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the mean KL(reference || logits) per token, from logits [..., vocabulary]."""
    p, q = reference.float().log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@named_lack_of_memory()
def run_end_pass(
    model: nn.Module, original: nn.Module, windows: Tensor, steps: int, seed: int, vectors: dict[str, torch.dtype],
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], EndPass]:  # fmt: skip
    """Tune a quantized model towards its float original, both on one device, on windows of tokens [count, length].

    Returns what to save: module -> its scale tensors, and name -> vector (both empty if nothing became better), and the
    figures. `vectors` maps parameters that may be tuned to the dtype they are saved in. Raises AfpqError for fewer than
    two windows, if the model's outputs are NaN or Inf, and for a lack of memory.
    """
    if len(windows) < 2:
        raise AfpqError("the end pass needs 2 windows, one to tune on and one held out: more --samples or text")
    windows = windows.to(next(original.parameters()).device)
    is_held_out = torch.arange(len(windows)) % min(HELD_OUT_ONE_IN, len(windows)) == 0
    held_out, training = windows[is_held_out], windows[~is_held_out]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tuned = TunedValues(model, vectors)
    moves = tuned.moves()
    best = [move.detach().clone() for move in moves]
    before = lowest = _held_out_kl(tuned, original, held_out)
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
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            found = _held_out_kl(tuned, original, held_out)
            if found < lowest:
                lowest, kept, best = found, step + 1, [move.detach().clone() for move in moves]
        if progress is not None:
            progress("end pass", step + 1, steps)
    with torch.no_grad():
        for move, value in zip(moves, best):
            move.copy_(value)
    result = EndPass(steps, before, lowest, kept, len(training), len(held_out))
    if not kept:
        return {}, {}, result
    scales = {name: layer.tensors() for name, layer in tuned.scales.items()}
    return scales, {name: v.rounded().detach().to(v.dtype) for name, v in tuned.vectors.items()}, result


def _logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


@torch.no_grad()
def _held_out_kl(tuned: TunedValues, original: nn.Module, windows: Tensor) -> float:
    """Return the mean KL over the windows. Raises AfpqError if it is not finite.

    The original's logits are recomputed each time: with a large vocabulary, those of a few windows take gigabytes.
    """
    losses = [kl(_logits(original, w), tuned.logits(w)).item() for w in windows.split(1)]
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        raise AfpqError("the end pass: the model's outputs are NaN or Inf on the calibration text")
    return mean


def _batches(windows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield windows for each step, all of them once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(len(windows), max(1, STEP_TOKENS // windows.shape[1]))
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(len(windows), generator=generator).tolist()
        yield windows[[left.pop() for _ in range(size)]]
