# SPDX-License-Identifier: MIT
"""Quantize the linears of one block, stage by stage, from the hidden states that enter it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from afpq.algorithms import LayerStatistics
from afpq.calibration.awq_block import awq_scale
from afpq.calibration.capture import BlockCall
from afpq.calibration.expert_inputs import route, routed_batch
from afpq.calibration.hidden_states import Activations, Inputs
from afpq.calibration.round_units import LayerLog
from afpq.calibration.solve_layer import solve_layer
from afpq.calibration.stages import Stage, collect, find_stages
from afpq.checkpoint.plan import Target
from afpq.model.experts import find_experts
from afpq.numerics.groups import QuantizedWeight
from afpq.recipe import Recipe

T = TypeVar("T")
Solved = dict[str, tuple[QuantizedWeight, LayerLog]]  # by the linear's name inside the block
ALONE = BlockCall((), {}, False)  # how an expert is called


@dataclass(frozen=True)
class BlockState:
    """A block being quantized.

    Attributes:
        call: how the model calls the block.
        quantized: the block in which quantized linears replace the float ones; `inputs`: its hidden states.
        float_block, float_inputs: the same of the float model; None if the method does not need it.
        gradients: second moments of the gradients at the linears' outputs [out, out], by name inside the block.
    """

    call: BlockCall
    quantized: nn.Module
    inputs: Inputs
    float_block: nn.Module | None
    float_inputs: Inputs | None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


def kinds_of(recipe: Recipe) -> tuple[str, ...]:
    """The models whose hidden states are kept: the quantized one, and the float one if the method needs it."""
    return ("quantized", "float") if recipe.traits.float_model else ("quantized",)


@dataclass(frozen=True)
class BlockSolver:
    """The recipe, the device that computes, and a directory for scratch files.

    `all_experts`: the statistics of every expert are those of all tokens, not only of the ones routed to it.
    """

    recipe: Recipe
    device: torch.device
    scratch: Path
    all_experts: bool

    def scale_channels(
        self, block: nn.Module, call: BlockCall, inputs: Activations, targets: Mapping[str, Target],
        saved_dtypes: dict[str, torch.dtype],
    ) -> str:  # fmt: skip
        """Apply AWQ's channel scales in place; return a note for the log."""
        schemes = {name: t.scheme for name, t in targets.items()}
        sample = inputs.sample(self.device)
        ratios = awq_scale(block, call, sample, schemes, saved_dtypes)
        for place, experts in find_experts(block).items():
            routed = routed_batch(block, place, call, sample)
            for number, expert in experts.named_children():
                tokens = routed.tokens_of(None if self.all_experts else int(number))
                if len(tokens.rows):
                    inside = below(f"{place}.{number}", schemes)
                    found = awq_scale(expert, ALONE, tokens.sample(self.device), inside, {})
                    ratios |= {f"{place}.{number}: {fold}": ratio for fold, ratio in found.items()}
        if not ratios:
            return f"no fold points are known for {type(block).__name__}: not scaled"
        return "; ".join(f"{fold}: error x {ratio:.3f}" for fold, ratio in ratios.items())

    def solve(self, state: BlockState, targets: Mapping[str, Target], index: int) -> Solved:
        """Quantize every linear of block `index`, by name inside it.

        Experts come last: only the end of a block reads their outputs.
        """
        experts = find_experts(state.quantized)
        places = tuple(f"{place}." for place in experts)
        solved = self._solve_stages(state, {n: t for n, t in targets.items() if not n.startswith(places)})
        for place in experts:
            members = below(place, targets)
            if members:
                found = self._solve_experts(state, place, members, index)
                solved |= {f"{place}.{name}": weight for name, weight in found.items()}
        return solved

    def _solve_experts(self, state: BlockState, place: str, targets: Mapping[str, Target], index: int) -> Solved:
        """Quantize each expert as a small block of its own, whose inputs are the tokens routed to it."""
        files = [self.scratch / f"experts-{kind}-{index}.bin" for kind in kinds_of(self.recipe)]
        routed = route(state.quantized, place, state.call, state.inputs, files[0], self.device)
        floats = None
        if state.float_block is not None and state.float_inputs is not None:
            floats = route(state.float_block, place, state.call, state.float_inputs, files[1], self.device)
        solved: Solved = {}
        for number, expert in state.quantized.get_submodule(place).named_children():
            tokens = routed.tokens_of(None if self.all_experts else int(number))
            inner = BlockState(
                call=ALONE,
                quantized=expert,
                inputs=tokens,
                float_block=None if state.float_block is None else state.float_block.get_submodule(f"{place}.{number}"),
                float_inputs=None if floats is None else replace(tokens, tensor=floats.hidden),
                gradients=below(f"{place}.{number}", state.gradients),
            )
            members = self._solve_stages(inner, below(number, targets))
            solved |= {f"{number}.{name}": found for name, found in members.items()}
        for file in files:
            file.unlink(missing_ok=True)
        return solved

    def _solve_stages(self, state: BlockState, targets: Mapping[str, Target]) -> Solved:
        """Quantize linears that read the same tensor together, and replace each in `state.quantized` by its codes."""
        first = next((hidden for _, hidden in state.inputs.batches(self.device)), None)
        stages = [] if first is None else find_stages(state.quantized, list(targets), state.call, first)
        solved: Solved = {}
        if not self.recipe.traits.sequential:
            found = [self._collect(stage, state) for stage in stages]
        for position, stage in enumerate(stages):
            statistics = self._collect(stage, state) if self.recipe.traits.sequential else found[position]
            for name in stage.linears:
                solved[name] = self._solve(name, targets[name], state, statistics)
        for name in targets:
            if name not in solved:
                solved[name] = self._solve(name, targets[name], state, None)
        return solved

    def _collect(self, stage: Stage, state: BlockState) -> LayerStatistics:
        return collect(
            stage, state.call, state.quantized, state.inputs, state.float_block, state.float_inputs, self.device
        )

    def _solve(
        self, name: str, target: Target, state: BlockState, statistics: LayerStatistics | None
    ) -> tuple[QuantizedWeight, LayerLog]:
        if statistics is not None:
            statistics = replace(statistics, G=state.gradients.get(name))
        linear = state.quantized.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight, log = solve_layer(linear.weight, statistics, target, self.recipe)
        linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        return weight, log


def below(place: str, values: Mapping[str, T]) -> dict[str, T]:
    """Return the values of names inside the module called `place`, by their names in there."""
    prefix = f"{place}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
