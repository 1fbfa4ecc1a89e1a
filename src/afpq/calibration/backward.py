# SPDX-License-Identifier: MIT
"""Run the float model forwards and the gradients of its loss backwards, a block at a time.

The forward pass stores the hidden states in front of every block; the backward pass runs each block again, from the
last to the first, and turns the gradients behind it into those in front of it. A hook can record what reaches a block's
linears meanwhile. Only one block is ever in memory, together with the modules outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from afpq.calibration.capture import BlockCall, advance, capture, materialize, move
from afpq.calibration.head_inputs import fill_outside, standing_in
from afpq.calibration.hidden_states import Activations
from afpq.calibration.solve_layer import named
from afpq.checkpoint.plan import Plan
from afpq.errors import AfpqError, named_lack_of_memory, one_line, out_of_memory
from afpq.model.blocks import Block, find_blocks
from afpq.progress import Progress


class FloatModelPass:
    """The float model's forward pass and its gradients' backward pass over all windows."""

    def __init__(
        self, plan: Plan, model: PreTrainedModel, windows: Tensor, scratch: Path, device: torch.device, report: Progress
    ) -> None:
        self.plan, self.model, self.windows = plan, model, windows
        self.scratch, self.device, self.report = scratch, device, report
        self.blocks = find_blocks(model)
        self.states: list[Activations] = []  # in front of each block, and behind the last
        self.calls: dict[str, BlockCall] = {}
        self.width = 0

    def forwards(self) -> None:
        """Store the hidden states in front of every block, and find the blocks that run."""
        fill_outside(self.model, self.blocks, self.plan)

        def write(_first: str, rows: slice, hidden: Tensor) -> None:
            if not self.states:
                self.width = hidden.shape[-1]
                self.states.append(self._store())
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
            self.report(f"gradients: forwards {block.name}", index, 2 * len(self.blocks))
            with named(block.name):
                self.states.append(self._store())
                real = self._load(block)
                advance(real, self.calls[block.name], self.states[index], self.states[index + 1], device)

    def backwards(self, seed: int, hook_for: Callable[[Block], GradientHook]) -> Iterator[Block]:
        """Yield each block from the last to the first, once gradients have passed it with its hook on."""
        gradients = self._store()
        self._from_the_end(gradients, seed)
        for done, block in enumerate(reversed(self.blocks)):
            self._step_back(done, block, gradients, gradients, hook_for(block))
            yield block

    def keep_gradients(self, seed: int, place: Callable[[int], Path]) -> None:
        """Store the gradients behind block i in the file place(i), for all blocks."""
        last = len(self.blocks) - 1
        behind = self._create(place(last))
        self._from_the_end(behind, seed)
        for index in range(last, 0, -1):
            before = self._create(place(index - 1))
            self._step_back(last - index, self.blocks[index], behind, before, None)
            behind = before

    def _from_the_end(self, behind: Activations, seed: int) -> None:
        self.report("gradients: head", len(self.blocks), 2 * len(self.blocks))
        loss_gradients(self.model, self.calls, self.windows, self.states.pop(), behind, seed)

    def _step_back(
        self, done: int, block: Block, behind: Activations, before: Activations, hook: GradientHook | None
    ) -> None:
        self.report(f"gradients: backwards {block.name}", len(self.blocks) + done, 2 * len(self.blocks))
        with named(block.name):
            real, call = self._load(block), self.calls[block.name]
            step_back(real, call, self.states.pop(), behind, self.device, hook, before)

    def _create(self, path: Path) -> Activations:
        return Activations(path, (*self.windows.shape, self.width), create=True)

    def _store(self) -> Activations:
        path = self.scratch / f"state-{len(self.states)}.bin"
        store = self._create(path)
        with suppress(OSError):  # some systems do not allow it
            path.unlink()  # the file lives until it is closed, however this run ends
        return store

    def _load(self, block: Block) -> nn.Module:
        prefix = f"{block.name}."
        parts = {name: part for name, part in self.plan.names.items() if name.startswith(prefix)}
        tensors = {name.removeprefix(prefix): self.plan.checkpoint.read_part(p) for name, p in parts.items()}
        return materialize(block.module, tensors, self.device)


@named_lack_of_memory()
def loss_gradients(
    model: PreTrainedModel, calls: Mapping[str, BlockCall], windows: Tensor, last: Activations, gradients: Activations,
    seed: int,
) -> None:  # fmt: skip
    """Compute gradients of the sum of -log p(y) by the last block's outputs, with y drawn from the predictions p.

    Everything outside the blocks is real in `model`, in float32 on the CPU. Window by window: logits are wide.
    Raises AfpqError for a model that predicts no tokens, and for a lack of memory.
    """
    blocks = [block for block in find_blocks(model) if block.name in calls]
    generator = torch.Generator().manual_seed(seed)
    for row in range(len(windows)):
        hidden = last.tensor[row : row + 1].clone().requires_grad_()
        with torch.enable_grad(), standing_in(blocks, calls, hidden):
            logits = getattr(model(windows[row : row + 1], use_cache=False), "logits", None)
            if logits is None:
                raise AfpqError(
                    f"{type(model).__name__} predicts no tokens, so there are no gradients; "
                    "use --method gptq without a bit budget"
                )
            logits = logits.float().flatten(0, -2)
            drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
            loss = cross_entropy(logits, drawn, reduction="sum")
            (gradients.tensor[row : row + 1],) = torch.autograd.grad(loss, hidden)


GradientHook = Callable[[nn.Module, slice], AbstractContextManager[None]]  # (block, windows that run inside it)


@named_lack_of_memory()
def step_back(
    block: nn.Module, call: BlockCall, inputs: Activations, behind: Activations, device: torch.device,
    hook: GradientHook | None = None, before: Activations | None = None,
) -> None:  # fmt: skip
    """Compute the gradients in front of the block from those behind it, and write them into `before` if given.

    Raises AfpqError for a block that cannot be run backwards, for a lack of memory, and for NaN or Inf.
    """
    for rows, states in inputs.batches(device):
        hidden = states.detach().clone().requires_grad_()
        with torch.enable_grad(), hook(block, rows) if hook is not None else nullcontext():
            result = call(block, hidden.clone())  # a copy: a leaf may not be changed in place
            try:
                (found,) = torch.autograd.grad(result, hidden, behind.tensor[rows].to(device))
            except (RuntimeError, MemoryError) as error:
                if (full := out_of_memory(error)) is not None:
                    raise full from None
                raise AfpqError(f"cannot be run backwards ({one_line(error)})") from None
        if not bool(torch.isfinite(found).all()):
            raise AfpqError("the gradients are NaN or Inf on the calibration text")
        if before is not None:
            before.tensor[rows] = found.float().cpu()
