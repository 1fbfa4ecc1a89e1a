# SPDX-License-Identifier: MIT
"""Embedding and head in a calibrated run: the embedding's rounding on the way in, the head's inputs on the way out.

The head reads the last block's outputs behind the model's final norm, or what else an architecture has there. So the
model is run around its blocks once more, with the stored outputs of the last block in place of the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from afpq.algorithms import LayerStatistics, fit_scheme
from afpq.algorithms.rtn import quantize_named
from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import Activations, batch_size
from afpq.calibration.round_units import LayerLog
from afpq.calibration.stages import input_of
from afpq.checkpoint.plan import Plan, Target
from afpq.model.blocks import Block
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import to_tensors
from afpq.recipe import Recipe

PART = 2**26  # weights of a head solved at a time: as many as a large layer of a block has
WHOLE = BlockCall((), {"use_cache": False}, False)


class Solver(Protocol):
    """`solve_layer`, by a scheme that is fitted already."""

    def __call__(
        self, W: Tensor, statistics: LayerStatistics | None, target: Target, recipe: Recipe, /, *, fitted: FittedScheme
    ) -> tuple[QuantizedWeight, LayerLog]: ...


def fill_outside(model: PreTrainedModel, blocks: list[Block], plan: Plan, head: bool = True) -> None:
    """Load the parameters outside the blocks as float32; without `head`, one that is no embedding stays as it is."""
    inside = tuple(f"{block.name}." for block in blocks)
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    alone = None if head or output is embedding else getattr(output, "weight", None)
    if alone is not None and alone is getattr(embedding, "weight", None):
        alone = None  # a tied one is there with the embedding
    values: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        source = name if name in plan.names else ties.get(name, name)
        if name.startswith(inside) or source not in plan.names or parameter is alone:
            continue
        if source not in values:
            values[source] = nn.Parameter(plan.checkpoint.read_part(plan.names[source]).float(), False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, values[source])


@contextmanager
def rounded_embedding(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Inside, the model looks tokens up in the table as it will be stored."""
    lookup = model.get_input_embeddings()
    assert recipe.embedding is not None
    table = lookup.weight
    lookup.weight = nn.Parameter(
        quantize_named("the embedding", table, recipe.embedding, recipe.search).dequantize(), False
    )
    try:
        yield
    finally:
        lookup.weight = table


@torch.no_grad()
def head_statistics(
    model: PreTrainedModel, blocks: list[Block], calls: dict[str, BlockCall], windows: Tensor, head: str,
    streams: list[Activations], device: torch.device,
) -> LayerStatistics:  # fmt: skip
    """The statistics of the head's inputs over all windows.

    `streams` are the states behind the last block, of the quantized model and, if it is needed, of the float one. All
    that stands between there and the head is real in `model`, in float32 on the CPU; the head need not be.
    """
    size = batch_size(*windows.shape)
    statistics: LayerStatistics | None = None
    for first in range(0, len(windows), size):
        rows = slice(first, first + size)
        inputs = []
        for stream in streams:
            with standing_in(blocks, calls, stream.tensor[rows]):
                inputs.append(input_of(model, head, WHOLE, windows[rows]).to(device))
        x, f = inputs[0], inputs[1] if len(inputs) > 1 else None
        if statistics is None:
            statistics = LayerStatistics.empty(x.shape[1], f is not None, device)
        statistics.add(x, f)
    assert statistics is not None
    return statistics


@contextmanager
def standing_in(blocks: list[Block], calls: Mapping[str, BlockCall], hidden: Tensor) -> Iterator[None]:
    """Inside, every block returns `hidden`, whatever it is given."""
    try:
        for block in blocks:
            result = (hidden,) if calls[block.name].tuple_result else hidden
            block.module.forward = lambda *_, result=result, **__: result
        yield
    finally:
        for block in blocks:
            del block.module.forward


@torch.no_grad()
def solve_in_parts(
    W: Tensor, statistics: LayerStatistics, target: Target, recipe: Recipe, solver: Solver
) -> tuple[dict[str, Tensor], LayerLog]:
    """Quantize a weight [out, in] of any height by `solver`, some rows at a time: (tensors to save, on the CPU; log).

    Given the inputs' statistics, rows do not depend on each other; only the grid of the scales and a learned codebook
    are the whole weight's.
    Errors of parts are averaged by the squares of the outputs (of the weights) they are relative to.
    """
    importance = statistics.importance
    importance = None if importance is None else importance.to(W.device)
    fitted = fit_scheme(W, target.scheme, recipe.search, importance)
    target = dataclasses.replace(target, scheme=fitted.scheme)
    height = max(8, PART // W.shape[1] // 8 * 8)  # whole bytes of zero points
    tensors: dict[str, list[Tensor]] = {}
    logs: list[LayerLog] = []
    weights, outputs = [], []
    for first in range(0, len(W), height):
        part = W[first : first + height].to(statistics.H.device, torch.float32)
        rows = dataclasses.replace(target, shape=(len(part), W.shape[1]))
        solved, log = solver(part, statistics, rows, recipe, fitted=fitted)
        for name, tensor in to_tensors(solved).items():
            tensors.setdefault(name, []).append(tensor.cpu())
        logs.append(log)
        weights.append(part.square().sum().item())
        outputs.append(((part @ statistics.H) * part).sum().item())
    joined = {name: torch.cat(found, int(name == "zeros")) for name, found in tensors.items() if name != "scale_grid"}
    joined |= {name: found[0] for name, found in tensors.items() if name == "scale_grid"}
    return joined, _joined_log(logs, weights, outputs, target)


def _joined_log(logs: list[LayerLog], weights: list[float], outputs: list[float], target: Target) -> LayerLog:
    def mean(name: str, sizes: list[float]) -> float | None:
        values: list[float] = [value for log in logs if (value := getattr(log, name)) is not None]
        if len(values) < len(logs):
            return None
        return sum(v * s for v, s in zip(values, sizes)) / (sum(sizes) or 1.0)

    return dataclasses.replace(
        logs[0],
        weight_error=mean("weight_error", weights) or 0.0,
        bits_per_weight=8 * target.bytes / target.elements,
        seconds=round(sum(log.seconds for log in logs), 4),
        output_error_before=mean("output_error_before", outputs),
        output_error=mean("output_error", outputs),
        damp=max((log.damp for log in logs if log.damp is not None), default=None),
        note=next((log.note for log in logs if log.note is not None), None),
    )
