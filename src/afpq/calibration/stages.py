# SPDX-License-Identifier: MIT
"""The linears of a block in stages that read one tensor, and the statistics of what a stage reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.algorithms import LayerStatistics
from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import Inputs
from afpq.errors import AfpqError


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same tensor, such as q, k and v; names within the block."""

    linears: tuple[str, ...]


@torch.no_grad()
def find_stages(block: nn.Module, names: list[str], call: BlockCall, hidden: Tensor) -> list[Stage]:
    """Group the block's linears `names` by the tensor they read, in the order they run, without unused ones."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, readers in seen:
                if tensor is args[0]:
                    readers.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [Stage(tuple(dict.fromkeys(readers))) for _, readers in seen]


class _Stop(Exception):
    """The end of a forward pass once its wanted tensor is computed."""


@torch.no_grad()
def arguments_of(
    block: nn.Module, inside: str, call: BlockCall, hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that the module `inside` gets when the block gets `hidden`; the rest is not run.

    Raises AfpqError if the module is not called.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stop

    handle = block.get_submodule(inside).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call(block, hidden)
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise AfpqError(f"{inside}: is not called when its block is run; use --method rtn")


def input_of(block: nn.Module, linear: str, call: BlockCall, hidden: Tensor) -> Tensor:
    """Return the linear's input when the block gets `hidden`: [tokens, in], float32."""
    x: Tensor = arguments_of(block, linear, call, hidden)[0][0]
    return x.flatten(0, -2).float()


def collect(
    stage: Stage, call: BlockCall, block: nn.Module, inputs: Inputs, float_block: nn.Module | None,
    float_inputs: Inputs | None, device: torch.device,
) -> LayerStatistics:  # fmt: skip
    """The statistics of a stage's input over all windows; D needs the float model's block and inputs."""
    statistics: LayerStatistics | None = None
    for rows, hidden in inputs.batches(device):
        x, f = input_of(block, stage.linears[0], call, hidden), None
        if statistics is None:
            statistics = LayerStatistics.empty(x.shape[1], float_block is not None, device)
        if float_block is not None and float_inputs is not None:
            f = input_of(float_block, stage.linears[0], call, float_inputs.tensor[rows].to(device))
        statistics.add(x, f)
    assert statistics is not None
    return statistics
