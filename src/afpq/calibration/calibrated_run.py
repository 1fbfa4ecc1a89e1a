# SPDX-License-Identifier: MIT
"""Run a plan whose method needs data: block after block, each fed by the quantized blocks before it.

In memory are one block (twice, while the float model runs beside), a batch of hidden states, and the moments of one
layer's inputs. The hidden states of all windows lie in files of the work directory: those a block reads are kept until
its successor's are complete and the block is recorded as finished, so that a run killed at any moment can go on.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from afpq.calibration.awq_block import awq_scale
from afpq.calibration.backward import FloatModelPass, Progress
from afpq.calibration.capture import BlockCall, advance, capture, materialize, move
from afpq.calibration.expert_inputs import route, routed_batch
from afpq.calibration.head_inputs import fill_outside, head_second_moments, rounded_embedding, solve_in_parts
from afpq.calibration.hidden_states import Activations, Inputs
from afpq.calibration.output_gradients import EXPERTS_BYTES, gradients_file, output_second_moments, store_gradients
from afpq.calibration.round_units import LayerLog, UnitResult, unit_tensors
from afpq.calibration.solve_layer import named, solve_layer
from afpq.calibration.stages import Moments, Stage, collect, find_stages
from afpq.checkpoint.plan import HEAD, Plan, PlanUnit, Target
from afpq.errors import AfpqError
from afpq.model.blocks import Block, find_blocks
from afpq.model.experts import find_experts
from afpq.model.tensor_part import TensorPart
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import to_tensors
from afpq.recipe import METHODS


@dataclass(frozen=True)
class CalibrationRun:
    """The windows of tokens [count, length], where scratch files go, and the device that computes.

    `all_experts`: every expert learns from all tokens, not only from those routed to it. `seed` draws the text whose
    gradients guided methods take; `report` is told how far that is.
    """

    windows: Tensor
    scratch: Path
    device: torch.device
    all_experts: bool = False
    seed: int = 0
    report: Progress = lambda *_: None


def run_calibrated(
    plan: Plan, model: PreTrainedModel, calibration: CalibrationRun, finished: Container[str] = ()
) -> Iterator[UnitResult]:
    """Each unit of the plan but for the finished ones, blocks in the order they run; those that text does not reach
    come before, rounded to nearest. `model` is the skeleton the plan was made with.
    """
    runner = _Runner(plan, model, calibration)
    if not runner.blocks:
        raise AfpqError("no blocks to run one after the other; use --method rtn")
    if runner.guided:
        c = calibration
        store_gradients(FloatModelPass(plan, copy.deepcopy(model), c.windows, c.scratch, c.device, c.report), c.seed)
    runner.capture(finished)
    units = {unit.name: unit for unit in plan.units}
    for unit in plan.units:
        if unit.name not in runner.calls and unit.name not in finished and unit.name != HEAD:
            logs: list[LayerLog] = []
            note = "not reached by text; rounded to nearest" if unit.in_blocks else None
            yield UnitResult(unit, unit_tensors(plan, unit, logs, note), logs)
    for index, block in enumerate(runner.blocks):
        if block.name not in finished:
            tensors, logs = runner.run_block(index, units[block.name])
            yield UnitResult(units[block.name], iter(tensors.items()), logs)
        runner.forget(index)
    if HEAD in units and HEAD not in finished:
        yield runner.run_head(units[HEAD])


T = TypeVar("T")
ALONE = BlockCall((), {}, False)  # how an expert is called


class _Runner:
    def __init__(self, plan: Plan, model: PreTrainedModel, calibration: CalibrationRun) -> None:
        self.plan, self.recipe, self.model = plan, plan.recipe, model
        self.windows, self.scratch, self.device = calibration.windows, calibration.scratch, calibration.device
        self.all_experts = calibration.all_experts
        self.blocks = find_blocks(model)
        self.calls: dict[str, BlockCall] = {}  # by block
        self.width = 0
        # The float model runs beside only for the solver that aims at its outputs.
        method, target = METHODS[self.recipe.method], self.recipe.gptq.float_target
        self.guided = method.guided
        self.beside = method.guided or (method.solver == "gptq" and target)

    # ---- hidden states

    def states(self, kind: str, index: int, create: bool = False) -> Activations:
        """What enters block `index` (what leaves the last, for one more) in the "quantized" or "float" model."""
        return Activations(self.scratch / f"{kind}-{index}.bin", (*self.windows.shape, self.width), create)

    def kinds(self) -> tuple[str, ...]:
        return ("quantized", "float") if self.beside else ("quantized",)

    def capture(self, finished: Container[str]) -> None:
        """Record which blocks are called, and how; also store what enters the first, unless that is finished."""
        fill_outside(self.model, self.blocks, self.plan, head=False)
        stores: list[Activations] = []

        def write(first: str, rows: slice, hidden: Tensor) -> None:
            self.width = hidden.shape[-1]
            if first not in finished and not stores:
                stores.extend(self.states(kind, 0, create=True) for kind in self.kinds())
            for store in stores:
                store.tensor[rows] = hidden.float()

        self.calls = capture(self.model, self.blocks, self.windows, write)
        blocks = {block.name: block for block in self.blocks}
        if stores and self.recipe.embedding is not None:
            del stores[1:]  # the float model's states are complete
            with rounded_embedding(self.model, self.recipe):
                capture(self.model, self.blocks, self.windows, write)
        self.blocks = [blocks[name] for name in self.calls]

    def run_head(self, unit: PlanUnit) -> UnitResult:
        """Quantize the head, from what leaves the last block."""
        (target,) = unit.targets
        last = len(self.blocks)
        streams = [self.states(kind, last) for kind in self.kinds()]
        weight = self.plan.checkpoint.read_part(target.source)
        moments = head_second_moments(
            self.model, self.blocks, self.calls, self.windows, target.module, streams, self.device
        )
        with named(target.tensor):
            tensors, log = solve_in_parts(weight, moments, target, self.recipe, solve_layer)
        return UnitResult(unit, ((target.prefix + part, tensor) for part, tensor in tensors.items()), [log])

    def forget(self, index: int) -> None:
        """A finished block's inputs are not needed any more."""
        for kind in self.kinds():
            (self.scratch / f"{kind}-{index}.bin").unlink(missing_ok=True)
        gradients_file(self.scratch, index).unlink(missing_ok=True)

    # ---- one block

    @torch.no_grad()
    def run_block(self, index: int, unit: PlanUnit) -> tuple[dict[str, Tensor], list[LayerLog]]:
        """Quantize a block and move the hidden states behind it; returns the unit's output tensors."""
        block = self.blocks[index]
        call = self.calls[block.name]
        with named(block.name):
            call = replace(call, args=move(call.args, self.device), kwargs=move(call.kwargs, self.device))
            tensors = {name: self.plan.checkpoint.read(name) for name in unit.tensors}
            local = {name: part.of(tensors[part.tensor]) for name, part in self._names_inside(block).items()}
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
                gradients=self._gradients(index, float_block, call, targets) if self.guided else {},
            )
            solved = self._solve_block(state, targets, index)
            advance(state.quantized, call, state.inputs, self.states("quantized", index + 1, True), self.device)
            if state.beside is not None and state.beside_inputs is not None:
                advance(state.beside, call, state.beside_inputs, self.states("float", index + 1, True), self.device)
        outputs = self._kept(block, state.quantized, tensors, unit)
        for name, (weight, _) in solved.items():
            outputs |= {targets[name].prefix + part: t.cpu() for part, t in to_tensors(weight).items()}
        return outputs, [replace(solved[name][1], transform=note) for name in targets]

    def _kept(self, block: Block, real: nn.Module, tensors: dict[str, Tensor], unit: PlanUnit) -> dict[str, Tensor]:
        """The unit's tensors that are not quantized; a transform may have changed the block's parameters."""
        parameters = dict(real.named_parameters()) if METHODS[self.recipe.method].transform is not None else {}
        kept = {name: tensor for name, tensor in tensors.items() if name not in unit.replaced}
        for name, part in self._names_inside(block).items():
            if part.whole and part.tensor in kept and name in parameters:
                value = parameters[name].T if part.transposed else parameters[name]
                kept[part.tensor] = value.to(kept[part.tensor].dtype).cpu().contiguous()
        for piece in unit.pieces:
            value = parameters.get(
                piece.name.removeprefix(f"{block.name}."), piece.source.of(tensors[piece.source.tensor])
            )
            kept[piece.output] = value.to(piece.spec[0]).cpu().contiguous()
        return kept

    def _scale(
        self, block: nn.Module, call: BlockCall, inputs: Activations, targets: dict[str, Target],
        saved_dtypes: dict[str, torch.dtype],
    ) -> str:  # fmt: skip
        """AWQ's channel scales, in place; what to note of them."""
        schemes = {name: t.scheme for name, t in targets.items()}
        sample = inputs.sample(self.device)
        ratios = awq_scale(block, call, sample, schemes, saved_dtypes)
        for place, experts in find_experts(block).items():
            routed = routed_batch(block, place, call, sample)
            for number, expert in experts.named_children():
                tokens = routed.tokens_of(None if self.all_experts else int(number))
                if len(tokens.rows):
                    inside = _below(f"{place}.{number}", schemes)
                    found = awq_scale(expert, ALONE, tokens.sample(self.device), inside, {})
                    ratios |= {f"{place}.{number}: {fold}": ratio for fold, ratio in found.items()}
        if not ratios:
            return f"no fold points are known for {type(block).__name__}: not scaled"
        return "; ".join(f"{fold}: error x {ratio:.3f}" for fold, ratio in ratios.items())

    def _gradients(
        self, index: int, block: nn.Module, call: BlockCall, targets: dict[str, Target]
    ) -> dict[str, Tensor]:  # fmt: skip
        """G of the block's linears; not of experts where they are too many."""
        experts = {name: target for name, target in targets.items() if target.expert}
        if 4 * sum(target.shape[0] ** 2 for target in experts.values()) > EXPERTS_BYTES:
            targets = {name: target for name, target in targets.items() if not target.expert}
        inputs = self.states("float", index)
        behind = Activations(gradients_file(self.scratch, index), tuple(inputs.tensor.shape), create=False)
        return output_second_moments(block, call, list(targets), inputs, behind, self.device)

    def _targets_inside(self, block: Block, unit: PlanUnit) -> dict[str, Target]:
        """The unit's targets by their linears' names inside the block."""
        return _below(block.name, {target.module: target for target in unit.targets})

    def _names_inside(self, block: Block) -> dict[str, TensorPart]:
        """Parameter's name inside the block -> where it is in the checkpoint."""
        return _below(block.name, self.plan.names)

    def _solve_block(
        self, state: _BlockState, targets: dict[str, Target], index: int
    ) -> dict[str, tuple[QuantizedWeight, LayerLog]]:
        """Every linear of the block; experts come last, since nothing in a block reads what they give but its end."""
        experts = find_experts(state.quantized)
        places = tuple(f"{place}." for place in experts)
        solved = self._solve_stages(state, {n: t for n, t in targets.items() if not n.startswith(places)})
        for place in experts:
            members = _below(place, targets)
            if members:
                found = self._solve_experts(state, place, members, index)
                solved |= {f"{place}.{name}": weight for name, weight in found.items()}
        return solved

    def _solve_experts(
        self, state: _BlockState, place: str, targets: dict[str, Target], index: int
    ) -> dict[str, tuple[QuantizedWeight, LayerLog]]:
        """Each expert is a small block of its own, whose inputs are the tokens routed to it."""
        files = [self.scratch / f"experts-{kind}-{index}.bin" for kind in self.kinds()]
        routed = route(state.quantized, place, state.call, state.inputs, files[0], self.device)
        beside = None
        if state.beside is not None and state.beside_inputs is not None:
            beside = route(state.beside, place, state.call, state.beside_inputs, files[1], self.device)
        solved: dict[str, tuple[QuantizedWeight, LayerLog]] = {}
        for number, expert in state.quantized.get_submodule(place).named_children():
            tokens = routed.tokens_of(None if self.all_experts else int(number))
            inner = _BlockState(
                call=ALONE,
                quantized=expert,
                inputs=tokens,
                beside=None if state.beside is None else state.beside.get_submodule(f"{place}.{number}"),
                beside_inputs=None if beside is None else replace(tokens, tensor=beside.hidden),
                gradients=_below(f"{place}.{number}", state.gradients),
            )
            members = self._solve_stages(inner, _below(number, targets))
            solved |= {f"{number}.{name}": found for name, found in members.items()}
        for file in files:
            file.unlink(missing_ok=True)
        return solved

    def _solve_stages(
        self, state: _BlockState, targets: dict[str, Target]
    ) -> dict[str, tuple[QuantizedWeight, LayerLog]]:
        """Linears fed by the same tensors together; each is replaced in `state.quantized` by what its codes say."""
        first = next((hidden for _, hidden in state.inputs.batches(self.device)), None)
        stages = [] if first is None else find_stages(state.quantized, list(targets), state.call, first)
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
        weight, log = solve_layer(linear.weight, moments, target, self.recipe, state.gradients.get(name))
        linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return weight, log


def _below(place: str, values: Mapping[str, T]) -> dict[str, T]:
    """What belongs to names inside the module called `place`, by their names in there."""
    prefix = f"{place}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _BlockState:
    """A block being quantized, what enters it, the float model's block and inputs where it runs beside, and the
    second moments of gradients at its linears' outputs, by their names inside."""

    call: BlockCall
    quantized: nn.Module
    inputs: Inputs
    beside: nn.Module | None
    beside_inputs: Inputs | None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
