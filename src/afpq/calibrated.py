# SPDX-License-Identifier: MIT
"""Run a plan whose method needs data: block after block, each fed by the quantized blocks before it.

In memory are one block (twice, while the float model runs beside), a batch of hidden states, and the moments of one
layer's inputs. The hidden states of all windows lie in files of the work directory: those a block reads are kept until
its successor's are complete and the block is recorded as finished, so that a run killed at any moment can go on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from afpq.algorithms import SingularHessian, quantize_gptq, quantize_rtn, search_clips, toward_float_outputs
from afpq.blocks import Block, find_blocks
from afpq.calibrate import (
    Activations,
    BlockCall,
    Moments,
    Stage,
    advance,
    capture,
    collect,
    find_stages,
    materialize,
    move,
)
from afpq.errors import AfpqError
from afpq.groups import QuantizedWeight, encode, with_grid
from afpq.head import head_moments, rounded_embedding, solve_in_parts
from afpq.packing import to_tensors
from afpq.pipeline import LayerLog, UnitResult, relative_error, unit_tensors
from afpq.plan import HEAD, OUTSIDE, Plan, Target, Unit
from afpq.scheme import METHODS, Recipe
from afpq.transforms import awq_scale


@dataclass(frozen=True)
class Calibration:
    """The windows of tokens [count, length], where scratch files go, and the device that computes."""

    windows: Tensor
    scratch: Path
    device: torch.device


def run_calibrated(
    plan: Plan, model: PreTrainedModel, calibration: Calibration, finished: Container[str] = ()
) -> Iterator[UnitResult]:
    """Each unit of the plan in order, but for the finished ones; `model` is the skeleton the plan was made with."""
    runner = _Runner(plan, model, calibration)
    if not runner.blocks:
        raise AfpqError("no blocks to run one after the other; use --method rtn")
    for unit in plan.units:
        if unit.name == OUTSIDE and unit.name not in finished:
            logs: list[LayerLog] = []
            yield UnitResult(unit, unit_tensors(plan, unit, logs), logs)
    runner.capture(fresh=runner.blocks[0].name not in finished)
    units = {unit.name: unit for unit in plan.units}
    for index, block in enumerate(runner.blocks):
        if block.name not in finished:
            tensors, logs = runner.run_block(index, units[block.name])
            yield UnitResult(units[block.name], iter(tensors.items()), logs)
        runner.forget(index)
    if HEAD in units and HEAD not in finished:
        yield runner.run_head(units[HEAD])


class _Runner:
    def __init__(self, plan: Plan, model: PreTrainedModel, calibration: Calibration) -> None:
        self.plan, self.recipe, self.model = plan, plan.recipe, model
        self.windows, self.scratch, self.device = calibration.windows, calibration.scratch, calibration.device
        self.blocks = find_blocks(model)
        self.calls: list[BlockCall] = []
        self.width = 0
        # The float model runs beside only for the solver that aims at its outputs.
        self.beside = METHODS[self.recipe.method].solver == "gptq" and self.recipe.gptq.float_target

    # ---- hidden states

    def states(self, kind: str, index: int, create: bool = False) -> Activations:
        """What enters block `index` (what leaves the last, for one more) in the "quantized" or "float" model."""
        return Activations(self.scratch / f"{kind}-{index}.bin", (*self.windows.shape, self.width), create)

    def kinds(self) -> tuple[str, ...]:
        return ("quantized", "float") if self.beside else ("quantized",)

    def capture(self, fresh: bool) -> None:
        """Record how the blocks are called; with `fresh`, also store what enters the first."""
        self._fill_outside()
        stores: list[Activations] = []

        def write(rows: slice, hidden: Tensor) -> None:
            self.width = hidden.shape[-1]
            if fresh and not stores:
                stores.extend(self.states(kind, 0, create=True) for kind in self.kinds())
            for store in stores:
                store.tensor[rows] = hidden.float()

        self.calls = capture(self.model, self.blocks, self.windows, write)
        if fresh and self.recipe.embedding is not None:
            del stores[1:]  # the float model's states are complete
            with rounded_embedding(self.model, self.recipe):
                capture(self.model, self.blocks, self.windows, write)

    def _fill_outside(self) -> None:
        """Load the parameters the model needs before its blocks; the head stays on the meta device."""
        head = self.model.get_output_embeddings()
        inside = {id(p) for block in self.blocks for p in block.module.parameters()}
        embedding = self.model.get_input_embeddings()
        for name, parameter in list(self.model.named_parameters()):
            unused = head is not None and parameter is getattr(head, "weight", None) and head is not embedding
            tied = embedding is not None and parameter is getattr(embedding, "weight", None)
            if id(parameter) in inside or (unused and not tied) or name not in self.plan.names:
                continue
            parent, _, leaf = name.rpartition(".")
            value = self.plan.checkpoint.read(self.plan.names[name]).float()
            setattr(self.model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))

    def run_head(self, unit: Unit) -> UnitResult:
        """Quantize the head, from what leaves the last block."""
        (target,) = unit.targets.values()
        last = len(self.blocks)
        streams, weight = [self.states(kind, last) for kind in self.kinds()], self.plan.checkpoint.read(target.tensor)
        moments = head_moments(self.model, self.blocks, self.calls, self.windows, target.module, streams, self.device)
        with _named(target.tensor):
            tensors, log = solve_in_parts(weight, moments, target, self.recipe, solve_layer)
        return UnitResult(unit, ((target.prefix + part, tensor) for part, tensor in tensors.items()), [log])

    def forget(self, index: int) -> None:
        """A finished block's inputs are not needed any more."""
        for kind in self.kinds():
            (self.scratch / f"{kind}-{index}.bin").unlink(missing_ok=True)

    # ---- one block

    @torch.no_grad()
    def run_block(self, index: int, unit: Unit) -> tuple[dict[str, Tensor], list[LayerLog]]:
        """Quantize a block and move the hidden states behind it; returns the unit's output tensors."""
        block, call = self.blocks[index], self.calls[index]
        with _named(block.name):
            call = replace(call, args=move(call.args, self.device), kwargs=move(call.kwargs, self.device))
            tensors = {name: self.plan.checkpoint.read(name) for name in unit.tensors}
            local = {name: tensors[t] for name, t in self._names_inside(block).items()}
            float_block = materialize(block.module, local, self.device)
            inputs, targets = self.states("quantized", index), self._targets_inside(block, unit)
            note = None
            if METHODS[self.recipe.method].transform == "awq":
                note = self._scale(float_block, call, inputs, targets, {n: t.dtype for n, t in local.items()})
            state = _BlockState(
                call=call,
                quantized=copy.deepcopy(float_block) if self.beside else float_block,
                inputs=inputs,
                beside=float_block if self.beside else None,
                beside_inputs=self.states("float", index) if self.beside else None,
            )
            solved = self._solve_stages(state, targets)
            advance(state.quantized, call, state.inputs, self.states("quantized", index + 1, True), self.device)
            if state.beside is not None and state.beside_inputs is not None:
                advance(state.beside, call, state.beside_inputs, self.states("float", index + 1, True), self.device)
        outputs = self._kept(block, state.quantized, tensors, unit)
        for name, (weight, _) in solved.items():
            outputs |= {targets[name].prefix + part: t.cpu() for part, t in to_tensors(weight).items()}
        return outputs, [replace(solved[name][1], transform=note) for name in targets]

    def _kept(self, block: Block, real: nn.Module, tensors: dict[str, Tensor], unit: Unit) -> dict[str, Tensor]:
        """The unit's tensors that are not quantized; a transform may have changed the block's parameters."""
        kept = {name: tensor for name, tensor in tensors.items() if name not in unit.targets}
        if METHODS[self.recipe.method].transform is not None:
            parameters = dict(real.named_parameters())
            for name, tensor in self._names_inside(block).items():
                if tensor in kept and name in parameters:
                    kept[tensor] = parameters[name].to(kept[tensor].dtype).cpu()
        return kept

    def _scale(
        self, block: nn.Module, call: BlockCall, inputs: Activations, targets: dict[str, Target],
        stored: dict[str, torch.dtype],
    ) -> str:  # fmt: skip
        """AWQ's channel scales, in place; what to note of them."""
        schemes = {name: t.scheme for name, t in targets.items()}
        ratios = awq_scale(block, call, inputs.sample(self.device), schemes, stored)
        if not ratios:
            return f"no fold points are known for {type(block).__name__}: not scaled"
        return "; ".join(f"{fold}: error x {ratio:.3f}" for fold, ratio in ratios.items())

    def _targets_inside(self, block: Block, unit: Unit) -> dict[str, Target]:
        """The unit's targets by their linears' names inside the block."""
        return {t.module.removeprefix(f"{block.name}."): t for t in unit.targets.values()}

    def _names_inside(self, block: Block) -> dict[str, str]:
        """Parameter's name inside the block -> its tensor in the checkpoint."""
        prefix = f"{block.name}."
        return {n.removeprefix(prefix): t for n, t in self.plan.names.items() if n.startswith(prefix)}

    def _solve_stages(
        self, state: _BlockState, targets: dict[str, Target]
    ) -> dict[str, tuple[QuantizedWeight, LayerLog]]:
        """Every linear of the block; each is replaced in `state.quantized` by what its codes say."""
        first = next(state.inputs.batches(self.device))[1]
        stages = find_stages(state.quantized, list(targets), state.call, first)
        solved: dict[str, tuple[QuantizedWeight, LayerLog]] = {}
        if not self.recipe.gptq.sequential:
            found = [self._moments(stage, state) for stage in stages]
        for position, stage in enumerate(stages):
            moments = self._moments(stage, state) if self.recipe.gptq.sequential else found[position]
            for name in stage.linears:
                solved[name] = self._solve(name, targets[name], state, moments)
        for name in targets:
            if name not in solved:
                solved[name] = self._solve(name, targets[name], state, None)
        return solved

    def _moments(self, stage: Stage, state: _BlockState) -> Moments:
        return collect(stage, state.call, state.quantized, state.inputs, state.beside, state.beside_inputs, self.device)

    def _solve(
        self, name: str, target: Target, state: _BlockState, moments: Moments | None
    ) -> tuple[QuantizedWeight, LayerLog]:
        linear = state.quantized.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight, log = solve_layer(linear.weight, moments, target, self.recipe)
        linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return weight, log


@dataclass(frozen=True)
class _BlockState:
    """A block being quantized, what enters it, and the float model's block and inputs where it runs beside."""

    call: BlockCall
    quantized: nn.Module
    inputs: Activations
    beside: nn.Module | None
    beside_inputs: Activations | None


def solve_layer(W: Tensor, moments: Moments | None, target: Target, recipe: Recipe) -> tuple[QuantizedWeight, LayerLog]:
    """One weight by the recipe's solver; rounded to nearest, with a note, where its inputs teach nothing.

    Raises AfpqError naming the tensor for NaN or Inf in the weight.
    """
    start = time.perf_counter()
    note = None if moments is not None else "not used on the calibration text; rounded to nearest"
    damp = before = after = None
    with _named(target.tensor):
        importance = None if moments is None else _importance(moments)
        nearest = quantize_rtn(W, target.scheme, recipe.search, importance)
        solved = nearest
        if moments is not None:
            try:
                solved, damp, before, after = _solve_on_moments(W, moments, target, recipe, nearest)
            except SingularHessian as error:
                note = f"{error}; rounded to nearest"
    log = LayerLog(
        module=target.module,
        scheme=str(target.scheme),
        method=recipe.method if note is None else "rtn",
        weight_error=relative_error(W, solved),
        bits_per_weight=8 * target.bytes / target.elements,
        seconds=round(time.perf_counter() - start, 4),
        output_error_before=before,
        output_error=after,
        damp=damp,
        tokens=None if moments is None else moments.tokens,
        note=note,
    )
    return solved, log


def _importance(moments: Moments) -> Tensor | None:
    """The inputs' second moments as weights of the columns; None where they are zero or not finite."""
    diagonal = moments.H.diagonal()
    return diagonal if bool(torch.isfinite(diagonal).all()) and bool(diagonal.max() > 0) else None


def _solve_on_moments(
    W: Tensor, moments: Moments, target: Target, recipe: Recipe, nearest: QuantizedWeight
) -> tuple[QuantizedWeight, float | None, float, float]:
    """(weight, damping, relative output error of rounding to nearest, and of this), against the outputs aimed at."""
    H, wanted, damp = moments.H, W, None
    if not bool(torch.isfinite(H).all()):
        raise SingularHessian("the layer's inputs are NaN or Inf")
    if METHODS[recipe.method].solver == "gptq":
        if moments.D is not None:
            wanted = toward_float_outputs(W, H, moments.D, recipe.gptq.damp)
        solved, damp = quantize_gptq(wanted, H, target.scheme, recipe.gptq, recipe.search)
    elif recipe.search == "mse":
        scheme = with_grid(W, target.scheme)
        scales = search_clips(W, H, scheme)
        solved = QuantizedWeight(encode(W, scales, scheme), scales, scheme)
    else:
        solved = nearest
    total = _loss(wanted, H)
    errors = [_loss(weight.dequantize() - wanted, H) / total if total else 0.0 for weight in (nearest, solved)]
    return solved, damp, errors[0], errors[1]


def _loss(E: Tensor, H: Tensor) -> float:
    return ((E @ H) * E).sum().item()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors raised inside say which block or tensor they are about."""
    try:
        yield
    except SingularHessian:
        raise
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None
