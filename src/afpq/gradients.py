# SPDX-License-Identifier: MIT
"""Run the float model forwards and the gradients of its loss backwards, a block at a time.

The pass forwards stores what enters every block; the pass backwards runs each block again, from the last to the first,
and turns the gradients behind it into those in front of it. Linears are listened to on the way. Only one block is ever
in memory, and what stands outside of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from afpq.blocks import Block, find_blocks
from afpq.calibrate import Activations, BlockCall, advance, capture, materialize, move
from afpq.errors import AfpqError
from afpq.head import fill_outside, standing_in
from afpq.plan import Plan
from afpq.solve import named

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


class Walk:
    """The float model forwards, and gradients back."""

    def __init__(
        self, plan: Plan, model: PreTrainedModel, windows: Tensor, scratch: Path, device: torch.device, report: Progress
    ) -> None:
        self.plan, self.model, self.windows = plan, model, windows
        self.scratch, self.device, self.report = scratch, device, report
        self.blocks = find_blocks(model)
        self.states: list[Activations] = []  # what enters each block, and what leaves the last
        self.calls: dict[str, BlockCall] = {}

    def forwards(self) -> None:
        """Store the hidden states in front of every block, and find which blocks run."""
        fill_outside(self.model, self.blocks, self.plan)

        def write(_first: str, rows: slice, hidden: Tensor) -> None:
            if not self.states:
                self.states.append(self._store(hidden.shape[-1]))
            self.states[0].tensor[rows] = hidden.float()

        calls = capture(self.model, self.blocks, self.windows, write)
        device = self.device
        self.calls = {
            name: replace(call, args=move(call.args, device), kwargs=move(call.kwargs, device))
            for name, call in calls.items()
        }
        modules = {block.name: block for block in self.blocks}
        self.blocks = [modules[name] for name in calls]
        for index, block in enumerate(self.blocks):
            self.report(f"sensitivities: forwards {block.name}", index, 2 * len(self.blocks))
            with named(block.name):
                self.states.append(self._store(self.states[0].tensor.shape[-1]))
                real = self._load(block)
                advance(real, self.calls[block.name], self.states[index], self.states[index + 1], device)

    def backwards(self, wanted: set[str], seed: int) -> Iterator[tuple[Block, dict[str, Tap]]]:
        """Each block from the last to the first, with what its linears in `wanted` saw, by their names inside it."""
        gradients = self._store(self.states[0].tensor.shape[-1])
        self.report("sensitivities: head", len(self.blocks), 2 * len(self.blocks))
        loss_gradients(self.model, self.calls, self.windows, self.states.pop(), gradients, seed)
        for done, block in enumerate(reversed(self.blocks)):
            self.report(f"sensitivities: backwards {block.name}", len(self.blocks) + done, 2 * len(self.blocks))
            with named(block.name):
                names = [name.removeprefix(f"{block.name}.") for name, _ in block.linears() if name in wanted]
                call, real = self.calls[block.name], self._load(block)
                taps = step_back(real, call, names, self.states.pop(), gradients, self.device)
            yield block, taps

    def _store(self, width: int) -> Activations:
        path = self.scratch / f"{len(self.states)}.bin"
        store = Activations(path, (*self.windows.shape, width), create=True)
        with suppress(OSError):  # a system that does not allow it
            path.unlink()  # the file lives on until it is used no more, however this run ends
        return store

    def _load(self, block: Block) -> nn.Module:
        prefix = f"{block.name}."
        stored = {name: place for name, place in self.plan.names.items() if name.startswith(prefix)}
        tensors = {name.removeprefix(prefix): self.plan.checkpoint.read_stored(s) for name, s in stored.items()}
        return materialize(block.module, tensors, self.device)


def loss_gradients(
    model: PreTrainedModel, calls: Mapping[str, BlockCall], windows: Tensor, last: Activations, gradients: Activations,
    seed: int,
) -> None:  # fmt: skip
    """Gradients of the sum of -log p(y) with respect to what leaves the last block, y drawn from the predictions p.

    All that stands outside the blocks is real in `model`, in float32 on the CPU. Window by window: logits are wide.
    """
    blocks = [block for block in find_blocks(model) if block.name in calls]
    generator = torch.Generator().manual_seed(seed)
    for row in range(len(windows)):
        hidden = last.tensor[row : row + 1].clone().requires_grad_()
        with torch.enable_grad(), standing_in(blocks, calls, hidden):
            logits = getattr(model(windows[row : row + 1], use_cache=False), "logits", None)
            if logits is None:
                raise AfpqError(f"{type(model).__name__} predicts no tokens; a bit budget needs predictions to compare")
            logits = logits.float().flatten(0, -2)
            drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
            loss = cross_entropy(logits, drawn, reduction="sum")
            (gradients.tensor[row : row + 1],) = torch.autograd.grad(loss, hidden)


@dataclass
class Gram:
    """The sum of x x^T over tokens x, [in, in]; the tokens themselves while they are fewer than `in`."""

    rows: list[Tensor] = field(default_factory=list)
    H: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """x [tokens, in], float32."""
        self.rows.append(x)
        self.tokens += len(x)
        if self.H is None and self.tokens > x.shape[1]:
            self.H = x.new_zeros(x.shape[1], x.shape[1])
        if self.H is not None:
            for rows in self.rows:
                self.H.addmm_(rows.T, rows)
            self.rows = []

    def diagonal(self) -> Tensor:
        return torch.cat(self.rows).square().sum(0) if self.H is None else self.H.diagonal()

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """A, B [rows, in] -> the diagonal of A H B^T, [rows]."""
        if self.H is not None:
            return ((A @ self.H) * B).sum(1)
        x = torch.cat(self.rows)
        return ((x @ A.T) * (x @ B.T)).sum(0)


@dataclass
class Tap:
    """What a linear saw: its inputs, and who else reads the same tensor.

    `gradient` [out]: sums over tokens of the squared gradients of its outputs; `growth` [windows], float64: sums of
    gradients times outputs, the bias left out; zero where only some tokens reach it.
    """

    gram: Gram
    gradient: Tensor
    growth: Tensor
    readers: tuple[str, ...]


def step_back(
    block: nn.Module, call: BlockCall, names: list[str], inputs: Activations, gradients: Activations,
    device: torch.device,
) -> dict[str, Tap]:  # fmt: skip
    """Gradients behind the block become those in front of it; what its linears `names` saw, of those that were run."""
    taps: dict[str, Tap] = {}
    for rows, stored in inputs.batches(device):
        hidden = stored.detach().clone().requires_grad_()
        seen: list[tuple[str, Tensor]] = []
        with torch.enable_grad(), _listening(block, names, rows, inputs.tensor.shape[:2], seen, taps):
            result = call(block, hidden.clone())  # a copy: a leaf may not be changed in place
            try:
                (found,) = torch.autograd.grad(result, hidden, gradients.tensor[rows].to(device))
            except RuntimeError as error:
                raise AfpqError(f"cannot be run backwards ({' '.join(str(error).split())[:200]})") from None
        if not bool(torch.isfinite(found).all()):
            raise AfpqError("the gradients are NaN or Inf on the calibration text")
        gradients.tensor[rows] = found.float().cpu()
        for position, (name, x) in enumerate(seen):
            if not any(x is earlier for _, earlier in seen[:position]):
                taps[name].gram.add(x.detach().flatten(0, -2).float())
    return taps


@contextmanager
def _listening(
    block: nn.Module, names: list[str], windows: slice, shape: Sequence[int], seen: list[tuple[str, Tensor]],
    taps: dict[str, Tap],
) -> Iterator[None]:  # fmt: skip
    """Inside, calls of the linears are noted in `seen` and what gradients tell is added to `taps`.

    What runs are these windows, of `shape` (windows, tokens of a window) in all.
    """

    def add(tap: Tap, output: Tensor, gradient: Tensor) -> None:
        gradient = gradient.detach().flatten(0, -2).float()
        tap.gradient += gradient.square().sum(0)
        part = tap.growth[windows]
        if len(gradient) == len(part) * shape[1]:
            part += (gradient * output.flatten(0, -2)).double().sum(1).view(len(part), -1).sum(1)

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        first = next((taps[reader] for reader, x in seen if x is args[0]), None)
        seen.append((name, args[0]))
        if name not in taps:
            growth = torch.zeros(shape[0], dtype=torch.float64, device=output.device)
            gram = Gram() if first is None else first.gram
            taps[name] = Tap(gram, torch.zeros(output.shape[-1], device=output.device), growth, ())
            readers = (*(first.readers if first is not None else ()), name)
            for reader in readers:
                taps[reader].readers = readers
        if output.requires_grad:
            bias = getattr(module, "bias", None)
            value = output.detach().clone() if bias is None else output.detach() - bias
            output.register_hook(partial(add, taps[name], value))

    handles = [block.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
