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
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.checkpoint.plan import Plan, loaded_bytes, original_bytes, vocabulary
from afpq.errors import AfpqError
from afpq.jobs.tuned_values import TunedValues
from afpq.model.tensor_part import TensorPart

RATE = 0.004  # of Adam, falling to 0 in a straight line; scales move by ratio, vectors relative to their size
BETAS = (0.9, 0.95)
STEP_TOKENS = 2048  # of a step
HELD_OUT_ONE_IN = 8  # one window in so many judges
EVALUATIONS = 4  # times it is judged on the way


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


def vector_places(plan: Plan) -> dict[str, str]:
    """Name in the model -> name in the files, of what is saved as the model has it; tune_end picks the vectors."""
    replaced = {tensor for unit in plan.units for tensor in unit.replaced}
    kept = {name: s.tensor for name, s in plan.names.items() if s == TensorPart(s.tensor) and s.tensor not in replaced}
    return kept | {piece.name: piece.output for unit in plan.units for piece in unit.pieces}


def end_pass_bytes(plan: Plan) -> int:
    """Memory of both models, of the codes a byte each, and of a step's logits."""
    codes, logits = sum(t.elements for t in plan.targets), 6 * 4 * vocabulary(plan) * STEP_TOKENS
    return original_bytes(plan) + loaded_bytes(plan) + codes + logits


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(reference || logits) of a token, from logits [..., vocabulary]."""
    p, q = reference.float().log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def run_end_pass(
    model: nn.Module, original: nn.Module, windows: Tensor, steps: int, seed: int, vectors: dict[str, torch.dtype],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], EndPass]:  # fmt: skip
    """A quantized model and its float original, on one device, windows of tokens [count, length] -> what to save:
    module -> its scale tensors, and name -> vector; empty where nothing became better.

    `vectors` names parameters that may be tuned, and the dtype each is saved in. Raises AfpqError for fewer than two
    windows, and where the model's outputs are NaN or Inf.
    """
    if len(windows) < 2:
        raise AfpqError("the end pass needs 2 windows, to learn from and to judge by: more --samples or text")
    windows = windows.to(next(original.parameters()).device)
    judges = torch.arange(len(windows)) % min(HELD_OUT_ONE_IN, len(windows)) == 0
    judging, training = windows[judges], windows[~judges]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tuned = TunedValues(model, vectors)
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
        if (step + 1) * EVALUATIONS // steps > step * EVALUATIONS // steps:
            found = _judge(tuned, original, judging)
            if found < lowest:
                lowest, kept, best = found, step + 1, [move.detach().clone() for move in moves]
        if progress is not None:
            progress(step + 1, steps)
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
def _judge(tuned: TunedValues, original: nn.Module, windows: Tensor) -> float:
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
    size = min(len(windows), max(1, STEP_TOKENS // windows.shape[1]))
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left = torch.randperm(len(windows), generator=generator).tolist()
        yield windows[[left.pop() for _ in range(size)]]
