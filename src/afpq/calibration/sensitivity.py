# SPDX-License-Identifier: MIT
"""Measure the cost of each scheme in each layer, block by block: the predicted KL divergence from the float model.

Rounding a layer's weights by dW moves its outputs on token t by dW x_t. To second order that moves the predictions by
a KL of 1/2 sum_t E (g_t dW x_t)^2, where g_t is the gradient of -log p(y) with respect to these outputs, for a text y
drawn from the model's own predictions (Fisher information). The errors have two parts:

- the scattered part. If gradients and inputs are independent, and outputs and tokens uncorrelated, it costs
  1/2 sum_i G_i dW_i H dW_i^T: G_i is the mean square of the gradient of output i, H the inputs' second moment;
- the part common to all outputs: least-squares scales make them smaller, by a share e that is their relative error
  (a tenth at 2 bits, 2 percent at 3). Over a window that costs 1/2 E (sum_n e_n sum_t g_t o_t)^2, n being the linears
  of the group, o their outputs. It falls with the square of the error, so it matters at 2 bits.

dW is the error of rounding to nearest. GPTQ leaves a share of its square, from 0.04 to 0.6, that depends on the inputs
and hardly on the scheme (docs/LOG.md): see `left_share`.

Gradients and inputs come from one forward and one backward pass, a block at a time (`backward.py`), over
MEASURED_TOKENS tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from afpq.algorithms import SingularHessian, quantize_rtn
from afpq.algorithms.gptq import factorize
from afpq.calibration.backward import FloatModelPass, GradientHook
from afpq.calibration.linear_hooks import LinearStatistics, SecondMoment, recording
from afpq.calibration.solve_layer import named
from afpq.checkpoint.plan import Plan, Target
from afpq.model.blocks import Block
from afpq.numerics.scheme import Scheme
from afpq.progress import Progress

MEASURED_TOKENS, WINDOW_TOKENS = 16384, 512  # of the calibration text, and at the start of each window
GPTQ_SHARE, OUTPUTS_SHARE = 0.4, 0.7  # what GPTQ leaves of the squared error, by inputs and by outputs, if not measured
WEIGHTS_PER_GROUP, MIN_ROWS = 2**16, 4  # rounded to try a scheme; of each layer at least so many rows


@dataclass(frozen=True)
class GroupLosses:
    """Linears that share a scheme, since they read the same tensor, and the KL per token that each scheme costs.

    The same linear of all experts of a layer is one group. No losses: text does not reach these layers.
    """

    layers: tuple[str, ...]
    losses: tuple[float, ...] | None


@dataclass(frozen=True)
class SensitivitySettings:
    """Settings of a measurement: windows of tokens [count, length], the seed of the drawn text, and a device.

    `search` is the scale search that the schemes will be used with, `damp` GPTQ's damping if that is the solver;
    `guided`: GPTQ on both sides.
    """

    windows: Tensor
    seed: int
    device: torch.device
    search: str
    damp: float | None = None
    guided: bool = False


def measured_windows(windows: Tensor) -> Tensor:
    """Pick calibration windows [count, length], spread evenly, and the first WINDOW_TOKENS tokens of each."""
    windows = windows[:, :WINDOW_TOKENS]
    count = min(len(windows), max(1, MEASURED_TOKENS // windows.shape[1]))
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def measure_losses(
    plan: Plan,
    model: PreTrainedModel,
    targets: Sequence[Target],
    schemes: Sequence[Scheme],
    how: SensitivitySettings,
    scratch: Path,
    progress: Progress | None = None,
) -> list[GroupLosses]:
    """Measure the cost of each of `schemes` in each group of `targets`, linears of the plan's blocks in running order.

    `model` is the skeleton the plan was made with; it is not changed. Hidden states go to files in `scratch`. Raises
    AfpqError if the architecture cannot be run block by block, forwards or backwards, and for weights, outputs or
    gradients that are NaN or Inf.
    """
    walk = FloatModelPass(plan, copy.deepcopy(model), how.windows, scratch, how.device, progress or (lambda *_: None))
    walk.forwards()
    found: list[GroupLosses] = []
    taps: dict[str, LinearStatistics] = {}

    def inside(block: Block) -> dict[str, Target]:
        prefix = f"{block.name}."
        return {t.module.removeprefix(prefix): t for t in targets if t.module.startswith(prefix)}

    def hook_for(block: Block) -> GradientHook:
        taps.clear()
        linears = inside(block)
        both = {name for name, target in linears.items() if how.guided and not target.expert}
        return partial(recording, list(linears), how.windows.shape, both, taps)

    for block in walk.backwards(how.seed, hook_for):
        found = [*_block_losses(plan, inside(block), taps, schemes, how), *found]
    reached = {layer for group in found for layer in group.layers}
    left: dict[str, list[str]] = {}
    for target in targets:
        if target.module not in reached:
            left.setdefault(kind_of_layer(target), []).append(target.module)
    return [*found, *(GroupLosses(tuple(layers), None) for layers in left.values())]


def kind_of_layer(target: Target) -> str:
    """Return the linear's name, with an expert's number as `*`."""
    parts = target.module.split(".")
    return ".".join([*parts[:-2], "*", parts[-1]]) if target.expert else target.module


def _block_losses(
    plan: Plan,
    targets: Mapping[str, Target],
    taps: Mapping[str, LinearStatistics],
    schemes: Sequence[Scheme],
    how: SensitivitySettings,
) -> Iterator[GroupLosses]:
    """Yield the groups of a block; `targets` and `taps` are by names inside it."""
    kinds: dict[str, dict[str, Target]] = {}
    for name, target in targets.items():
        kinds.setdefault(kind_of_layer(target), {})[name] = target
    for tap in taps.values():
        together = dict.fromkeys(kind_of_layer(targets[reader]) for reader in tap.readers)
        members = {name: target for kind in together for name, target in kinds.pop(kind, {}).items()}
        if members:
            found = []
            shares: dict[int, float] = {}  # by second moment: one for all readers of a tensor
            for name in members.keys() & taps.keys():
                with named(members[name].tensor):
                    W = plan.checkpoint.read_part(members[name].source).to(how.device, torch.float32)
                    limit = max(MIN_ROWS, WEIGHTS_PER_GROUP // len(members) // W.shape[1])
                    gram = taps[name].gram
                    if how.damp is not None and id(gram) not in shares:
                        shares[id(gram)] = left_share(gram, how.damp, GPTQ_SHARE)
                    share, outputs = shares.get(id(gram), 1.0), taps[name].outputs
                    if how.damp is not None and how.guided:
                        share *= OUTPUTS_SHARE if outputs is None else left_share(outputs, how.damp, OUTPUTS_SHARE)
                    found.append(layer_errors(W, taps[name], schemes, how.search, limit).times(share))
            yield GroupLosses(tuple(target.module for target in members.values()), _total(found, how))


def _total(found: Sequence[LayerErrors], how: SensitivitySettings) -> tuple[float, ...]:
    """Sum a group's losses, KL per token; at least one token reached it."""
    scattered = torch.stack([errors.scattered for errors in found]).sum(0)
    common = torch.stack([errors.common for errors in found]).sum(0).square().sum(1)
    losses: list[float] = ((scattered + common) / (2 * how.windows.numel())).tolist()
    return tuple(losses)


@dataclass(frozen=True)
class LayerErrors:
    """Errors of a layer under each scheme, float64 on the CPU.

    `scattered` [schemes]: the sum over tokens of G_i dW_i H dW_i^T. `common` [schemes, windows]: the change of the loss
    by the part common to all outputs.
    """

    scattered: Tensor
    common: Tensor

    def times(self, share: float) -> LayerErrors:
        """Return the errors of a solver that leaves this share of the squared error; both parts scale with it."""
        return LayerErrors(share * self.scattered, share * self.common)


def left_share(gram: SecondMoment, damp: float, default: float) -> float:
    """Estimate the share of rounding to nearest's squared output error that GPTQ leaves, whatever the scheme.

    `default` is returned for too few tokens. GPTQ corrects an error in column j by the columns still to come, so what
    remains of it is the variance of input j given those: the sum of these over the sum of all variances. In GPTQ's
    terms (Hinv = U^T U) the error is dW = -e U, and (U H U^T)_jj / U_jj^2 that variance; it is too small by (T - k) / T
    if fitted to T tokens with k columns. If GPTQ works on both sides of a weight, the shares of its inputs and of its
    outputs' gradients multiply.
    """
    width = len(gram.diagonal())
    if gram.H is None or gram.tokens < 2 * width:
        return default
    order = gram.diagonal().argsort(descending=True, stable=True)
    try:
        U = factorize(gram.H, damp, order).U
    except SingularHessian:
        return default
    left = ((U @ gram.H[order][:, order]) * U).sum(1) / U.diagonal().square()
    behind = torch.arange(width - 1, -1, -1, device=left.device)
    share = (left * gram.tokens / (gram.tokens - behind)).sum() / gram.diagonal().sum()
    return min(1.0, share.item())


def layer_errors(W: Tensor, tap: LinearStatistics, schemes: Sequence[Scheme], search: str, limit: int) -> LayerErrors:
    """Estimate the errors of W [out, in] rounded to nearest by each scheme, from `limit` rows.

    Rows are drawn in proportion to G_i times the size of their outputs, since errors are nearly proportional to that.
    """
    importance = tap.gram.diagonal()
    rows, shares = _draw(tap.gradient * (W.square() @ importance), limit)
    part, weights = W[rows], tap.gradient[rows].double() * shares
    columns = importance if bool(importance.max() > 0) else None
    size = (weights * tap.gram.product(part, part)).sum()
    scattered, common = [], []
    for scheme in schemes:
        error = quantize_rtn(part, scheme, search, columns).dequantize() - part
        scattered.append((weights * tap.gram.product(error, error)).sum() / tap.gram.tokens)
        shrunk = (weights * tap.gram.product(error, part)).sum() / size
        common.append(tap.growth * shrunk.nan_to_num())
    return LayerErrors(torch.stack(scattered).cpu(), torch.stack(common).cpu())


def _draw(sizes: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return (at most `limit` places, the number that each represents): even steps along the sum of `sizes`."""
    if limit >= len(sizes) or not bool(sizes.sum() > 0):
        places = torch.arange(min(limit, len(sizes)), device=sizes.device)
        return places, torch.ones_like(places, dtype=torch.float64)
    total = sizes.double().cumsum(0)
    points = (torch.arange(limit, dtype=torch.float64, device=sizes.device) + 0.5) / limit * total[-1]
    places, counts = torch.searchsorted(total, points).unique_consecutive(return_counts=True)
    return places, counts * total[-1] / limit / sizes[places]
