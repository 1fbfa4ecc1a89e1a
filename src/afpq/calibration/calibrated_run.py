# SPDX-License-Identifier: MIT
"""Run a plan whose method needs text: block after block, each fed by the quantized blocks before it.

In memory are one block (twice, if the float model runs next to the quantized one), a batch of hidden states, and the
statistics of one layer. The hidden states of all windows lie in files of the work directory: those a block reads are
kept until its successor's are complete and the block is recorded as finished, so that a run killed at any moment can
go on.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from afpq.algorithms.methods import METHODS
from afpq.calibration.backward import FloatModelPass
from afpq.calibration.capture import BlockCall, advance, capture, materialize, move
from afpq.calibration.head_inputs import fill_outside, head_statistics, rounded_embedding, solve_in_parts
from afpq.calibration.hidden_states import Activations
from afpq.calibration.output_gradients import EXPERTS_BYTES, gradients_file, output_second_moments, store_gradients
from afpq.calibration.round_units import LayerLog, UnitResult, learned_schemes, round_unit
from afpq.calibration.solve_block import BlockSolver, BlockState, below, kinds_of
from afpq.calibration.solve_layer import named, solve_layer
from afpq.checkpoint.plan import HEAD, Plan, PlanUnit, Target
from afpq.errors import AfpqError
from afpq.model.blocks import Block, find_blocks
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import to_tensors
from afpq.progress import Progress

NOT_REACHED = "not reached by text; rounded to nearest"
OUTSIDE_BLOCKS = "rounded to nearest, as are all outside of the blocks"


@dataclass(frozen=True)
class CalibrationRun:
    """The windows of tokens [count, length], where scratch files go, and the device that computes.

    `all_experts`: the statistics of every expert are those of all tokens, not only of the ones routed to it. `seed`
    draws the text whose gradients guided methods take; `report` gets the progress of that.
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
    """Yield each unit of the plan except the finished ones, blocks in the order they run; those that text does not
    reach come before, rounded to nearest. `model` is the skeleton the plan was made with.
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
            yield round_unit(plan, unit, NOT_REACHED if unit.in_blocks else OUTSIDE_BLOCKS)
    for index, block in enumerate(runner.blocks):
        if block.name not in finished:
            tensors, logs, schemes = runner.run_block(index, units[block.name])
            yield UnitResult(units[block.name], iter(tensors.items()), logs, schemes)
        runner.forget(index)
    if HEAD in units and HEAD not in finished:
        yield runner.run_head(units[HEAD])


class _Runner:
    def __init__(self, plan: Plan, model: PreTrainedModel, calibration: CalibrationRun) -> None:
        self.plan, self.recipe, self.model = plan, plan.recipe, model
        self.windows, self.scratch, self.device = calibration.windows, calibration.scratch, calibration.device
        self.blocks = find_blocks(model)
        self.calls: dict[str, BlockCall] = {}  # by block
        self.width = 0
        self.guided, self.float_model = self.recipe.traits.gradients, self.recipe.traits.float_model
        self.kinds = kinds_of(self.recipe)
        self.solver = BlockSolver(self.recipe, self.device, self.scratch, calibration.all_experts)

    # ---- hidden states

    def states(self, kind: str, index: int, create: bool = False) -> Activations:
        """What enters block `index` (what leaves the last, for one more) in the "quantized" or "float" model."""
        return Activations(self.scratch / f"{kind}-{index}.bin", (*self.windows.shape, self.width), create)

    def capture(self, finished: Container[str]) -> None:
        """Record which blocks are called, and how; also store what enters the first, unless that is finished."""
        fill_outside(self.model, self.blocks, self.plan, head=False)
        stores: list[Activations] = []

        def write(first: str, rows: slice, hidden: Tensor) -> None:
            self.width = hidden.shape[-1]
            if first not in finished and not stores:
                stores.extend(self.states(kind, 0, create=True) for kind in self.kinds)
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
        streams = [self.states(kind, last) for kind in self.kinds]
        weight = self.plan.checkpoint.read_part(target.source)
        statistics = head_statistics(
            self.model, self.blocks, self.calls, self.windows, target.module, streams, self.device
        )
        with named(target.tensor):
            tensors, log = solve_in_parts(weight, statistics, target, self.recipe, solve_layer)
        outputs = ((target.prefix + part, tensor) for part, tensor in tensors.items())
        return UnitResult(unit, outputs, [log], learned_schemes([target], [log]))

    def forget(self, index: int) -> None:
        """A finished block's inputs are not needed any more."""
        for kind in self.kinds:
            (self.scratch / f"{kind}-{index}.bin").unlink(missing_ok=True)
        gradients_file(self.scratch, index).unlink(missing_ok=True)

    # ---- one block

    @torch.no_grad()
    def run_block(self, index: int, unit: PlanUnit) -> tuple[dict[str, Tensor], list[LayerLog], dict[str, str]]:
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
            if METHODS[self.recipe.method].scales_channels:
                note = self.solver.scale_channels(
                    float_block, call, inputs, targets, {n: t.dtype for n, t in local.items()}
                )
            state = BlockState(
                call=call,
                quantized=copy.deepcopy(float_block) if self.float_model else float_block,
                inputs=inputs,
                float_block=float_block if self.float_model else None,
                float_inputs=self.states("float", index) if self.float_model else None,
                gradients=self._gradients(index, float_block, call, targets) if self.guided else {},
            )
            solved = self.solver.solve(state, targets, index)
            advance(state.quantized, call, state.inputs, self.states("quantized", index + 1, True), self.device)
            if state.float_block is not None and state.float_inputs is not None:
                advance(state.float_block, call, state.float_inputs, self.states("float", index + 1, True), self.device)
        outputs = self._kept(block, state.quantized, tensors, unit)
        for name, (weight, _) in solved.items():
            outputs |= {targets[name].prefix + part: t.cpu() for part, t in to_tensors(weight).items()}
        logs = [replace(solved[name][1], transform=note) for name in targets]
        return outputs, logs, learned_schemes(targets.values(), logs)

    def _kept(self, block: Block, real: nn.Module, tensors: dict[str, Tensor], unit: PlanUnit) -> dict[str, Tensor]:
        """The unit's tensors that are not quantized; a transform may have changed the block's parameters."""
        parameters = dict(real.named_parameters()) if METHODS[self.recipe.method].scales_channels else {}
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
        return below(block.name, {target.module: target for target in unit.targets})

    def _names_inside(self, block: Block) -> dict[str, TensorPart]:
        """Parameter's name inside the block -> where it is in the checkpoint."""
        return below(block.name, self.plan.names)
