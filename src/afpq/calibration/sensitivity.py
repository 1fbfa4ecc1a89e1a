# SPDX-License-Identifier: MIT
"""What each scheme would cost in each layer: predicted KL divergence from the float model, measured block by block.

Rounding a layer's weights by dW moves its outputs on token t by dW x_t. To second order that moves the predictions by
a KL of 1/2 sum_t E (g_t dW x_t)^2, where g_t is the gradient of -log p(y) with respect to these outputs, of a text y
drawn from the model's own predictions (Fisher's information). The errors have two parts:

- what scatters. Taking gradients and inputs for independent, and outputs and tokens for uncorrelated, it costs
  1/2 sum_i G_i dW_i H dW_i^T: G_i is the mean square of the gradient of output i, H the inputs' second moment;
- what all outputs have in common: scales of least squares make them smaller, by a share e that is their relative error
  (a tenth at 2 bits, 2 percent at 3). Over a window that costs 1/2 E (sum_n e_n sum_t g_t o_t)^2, n being the linears
  of the group, o their outputs. It falls with the square of the error, so it matters at 2 bits.

dW is the error of rounding to nearest. GPTQ leaves a share of its square, from 0.04 to 0.6, that depends on the inputs
and hardly on the scheme (docs/LOG.md): see `left_share`.

Gradients and inputs come from one pass forwards and one backwards, a block at a time (`gradients.py`), over TOKENS
tokens.
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
from afpq.calibration.backward import FloatModelPass, Listener
from afpq.calibration.linear_hooks import LinearStatistics, SecondMoment, listening
from afpq.calibration.solve_layer import named
from afpq.checkpoint.plan import Plan, Target
from afpq.model.blocks import Block
from afpq.numerics.scheme import Scheme
from afpq.progress import Progress

TOKENS, LENGTH = 16384, 512  # of the calibration text: how many, and of a window the first so many
GPTQ_SHARE, OUTPUTS_SHARE = 0.4, 0.7  # what GPTQ leaves of the squared error, by inputs and by outputs, unless known
SAMPLED, ROWS = 2**16, 4  # weights of a group that are rounded to try a scheme; rows of a layer, at least


@dataclass(frozen=True)
class GroupLosses:
    """Linears that share a scheme, since they read the same tensor, and the KL a token that each scheme would cost.

    Alike experts of one layer are one group. No losses: text does not reach these layers.
    """

    layers: tuple[str, ...]
    losses: tuple[float, ...] | None


@dataclass(frozen=True)
class SensitivitySettings:
    """How to measure: windows of tokens [count, length], the seed of the text that is drawn, and a device.

    `search` is the scale search that the schemes will be used with, `damp` GPTQ's damping where that is the solver;
    `guided`: on both sides.
    """

    windows: Tensor
    seed: int
    device: torch.device
    search: str
    damp: float | None = None
    guided: bool = False


def measured_windows(windows: Tensor) -> Tensor:
    """Some of the calibration windows [count, length], spread evenly, and the first LENGTH tokens of each."""
    windows = windows[:, :LENGTH]
    count = min(len(windows), max(1, TOKENS // windows.shape[1]))
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
    """What each of `schemes` costs in each group of `targets`, linears of the plan's blocks, in the order they run.

    `model` is the skeleton the plan was made with; it stays as it is. Hidden states go to files in `scratch`. Raises
    AfpqError where the architecture cannot be run block by block, forwards or backwards, and for weights, outputs or
    gradients that are NaN or Inf.
    """
    walk = FloatModelPass(plan, copy.deepcopy(model), how.windows, scratch, how.device, progress or (lambda *_: None))
    walk.forwards()
    found: list[GroupLosses] = []
    taps: dict[str, LinearStatistics] = {}

    def inside(block: Block) -> dict[str, Target]:
        prefix = f"{block.name}."
        return {t.module.removeprefix(prefix): t for t in targets if t.module.startswith(prefix)}

    def listen(block: Block) -> Listener:
        taps.clear()
        linears = inside(block)
        both = {name for name, target in linears.items() if how.guided and not target.expert}
        return partial(listening, list(linears), how.windows.shape, both, taps)

    for block in walk.backwards(how.seed, listen):
        found = [*_block_losses(plan, inside(block), taps, schemes, how), *found]
    reached = {layer for group in found for layer in group.layers}
    left: dict[str, list[str]] = {}
    for target in targets:
        if target.module not in reached:
            left.setdefault(kind_of_layer(target), []).append(target.module)
    return [*found, *(GroupLosses(tuple(layers), None) for layers in left.values())]


def kind_of_layer(target: Target) -> str:
    """The linear's name, of an expert without its number."""
    parts = target.module.split(".")
    return ".".join([*parts[:-2], "*", parts[-1]]) if target.expert else target.module


def _block_losses(
    plan: Plan,
    targets: Mapping[str, Target],
    taps: Mapping[str, LinearStatistics],
    schemes: Sequence[Scheme],
    how: SensitivitySettings,
) -> Iterator[GroupLosses]:
    """The groups of a block; `targets` and `taps` are by names inside it. Alike experts are in one group."""
    kinds: dict[str, dict[str, Target]] = {}
    for name, target in targets.items():
        kinds.setdefault(kind_of_layer(target), {})[name] = target
    for tap in taps.values():
        together = dict.fromkeys(kind_of_layer(targets[reader]) for reader in tap.readers)
        members = {name: target for kind in together for name, target in kinds.pop(kind, {}).items()}
        if members:
            found = []
            shares: dict[int, float] = {}  # by Gram: one for all readers of a tensor
            for name in members.keys() & taps.keys():
                with named(members[name].tensor):
                    W = plan.checkpoint.read_part(members[name].source).to(how.device, torch.float32)
                    limit = max(ROWS, SAMPLED // len(members) // W.shape[1])
                    gram = taps[name].gram
                    if how.damp is not None and id(gram) not in shares:
                        shares[id(gram)] = left_share(gram, how.damp, GPTQ_SHARE)
                    share, outputs = shares.get(id(gram), 1.0), taps[name].outputs
                    if how.damp is not None and how.guided:
                        share *= OUTPUTS_SHARE if outputs is None else left_share(outputs, how.damp, OUTPUTS_SHARE)
                    found.append(layer_errors(W, taps[name], schemes, how.search, limit).times(share))
            yield GroupLosses(tuple(target.module for target in members.values()), _total(found, how))


def _total(found: Sequence[LayerErrors], how: SensitivitySettings) -> tuple[float, ...]:
    """A group's losses, KL a token; at least one text token reached it."""
    scattered = torch.stack([errors.scattered for errors in found]).sum(0)
    common = torch.stack([errors.common for errors in found]).sum(0).square().sum(1)
    losses: list[float] = ((scattered + common) / (2 * how.windows.numel())).tolist()
    return tuple(losses)


@dataclass(frozen=True)
class LayerErrors:
    """Of each scheme: `scattered` [schemes], the sum over tokens of G_i dW_i H dW_i^T; `common` [schemes, windows], the
    change of the loss by what all outputs have in common. On the CPU, float64."""

    scattered: Tensor
    common: Tensor

    def times(self, share: float) -> LayerErrors:
        """Of a solver that leaves this share of the squared error; what is in common is in proportion to that."""
        return LayerErrors(share * self.scattered, share * self.common)


def left_share(gram: SecondMoment, damp: float, unknown: float) -> float:
    """What GPTQ leaves of the squared output error of rounding to nearest, whatever the scheme; `unknown` where too few
    tokens tell.

    GPTQ corrects an error in column j by the columns still to come, so what remains of it is the variance of input j
    given those: the sum of these over the sum of all variances. In GPTQ's terms (Hinv = U^T U) the error is dW = -e U,
    and (U H U^T)_jj / U_jj^2 that variance; it is too small by (T - k) / T, being fitted to T tokens with k columns.
    On both sides of a weight the shares of its inputs and of its outputs' gradients multiply.
    """
    width = len(gram.diagonal())
    if gram.H is None or gram.tokens < 2 * width:
        return unknown
    order = gram.diagonal().argsort(descending=True, stable=True)
    try:
        U = factorize(gram.H, damp, order).U
    except SingularHessian:
        return unknown
    left = ((U @ gram.H[order][:, order]) * U).sum(1) / U.diagonal().square()
    behind = torch.arange(width - 1, -1, -1, device=left.device)
    share = (left * gram.tokens / (gram.tokens - behind)).sum() / gram.diagonal().sum()
    return min(1.0, share.item())


def layer_errors(W: Tensor, tap: LinearStatistics, schemes: Sequence[Scheme], search: str, limit: int) -> LayerErrors:
    """W [out, in] rounded to nearest by each scheme; estimated from `limit` rows.

    Rows are drawn in proportion to G_i times the size of their outputs, to which errors are nearly in proportion.
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
    """(at most `limit` places, what each stands for): evenly spaced draws along the sum of `sizes`."""
    if limit >= len(sizes) or not bool(sizes.sum() > 0):
        places = torch.arange(min(limit, len(sizes)), device=sizes.device)
        return places, torch.ones_like(places, dtype=torch.float64)
    total = sizes.double().cumsum(0)
    points = (torch.arange(limit, dtype=torch.float64, device=sizes.device) + 0.5) / limit * total[-1]
    places, counts = torch.searchsorted(total, points).unique_consecutive(return_counts=True)
    return places, counts * total[-1] / limit / sizes[places]
