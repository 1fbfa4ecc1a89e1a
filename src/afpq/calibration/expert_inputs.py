# SPDX-License-Identifier: MIT
"""Inputs of a block's experts for all windows, and the tokens that are routed to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import BLOCK_BATCH_TOKENS, Activations, Inputs
from afpq.calibration.stages import arguments_of
from afpq.errors import AfpqError


@dataclass(frozen=True)
class Tokens:
    """The rows (int64 [count]) of a tensor [tokens, hidden] that enter one expert, as Activations enter a block."""

    tensor: Tensor
    rows: Tensor

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows of the tensor, their hidden states on the device)."""
        for rows in self.rows.split(BLOCK_BATCH_TOKENS):
            if len(rows):
                yield rows, self.tensor[rows].to(device)

    def sample(self, device: torch.device) -> Tensor:
        """Return at most one batch, spread evenly over all."""
        count = min(len(self.rows), BLOCK_BATCH_TOKENS)
        spread = torch.linspace(0, len(self.rows) - 1, count).round().long()
        return self.tensor[self.rows[spread]].to(device)


@dataclass(frozen=True)
class Routed:
    """Inputs of a module of experts: `hidden` [tokens, hidden] and the experts `chosen` [tokens, k] for each token."""

    hidden: Tensor
    chosen: Tensor

    def tokens_of(self, expert: int | None) -> Tokens:
        """Return the tokens that are routed to an expert; all of them for None."""
        reached = torch.ones(len(self.hidden), dtype=torch.bool)
        if expert is not None:
            reached = (self.chosen == expert).any(dim=1)
        return Tokens(self.hidden, reached.nonzero()[:, 0])


def routed_batch(block: nn.Module, experts: str, call: BlockCall, hidden: Tensor) -> Routed:
    """Return the inputs of the module `experts` when `hidden` enters the block; the rest is not run.

    Raises AfpqError if these are not hidden states and the choice of experts, a row for each token.
    """
    args, kwargs = arguments_of(block, experts, call, hidden)
    given = (*args, *kwargs.values())
    if len(given) < 2 or len(given[0]) != len(given[1]):
        raise AfpqError(f"{experts}: its experts are not called token by token here; use --method rtn")
    return Routed(given[0].float(), given[1])


def route(block: nn.Module, experts: str, call: BlockCall, inputs: Inputs, path: Path, device: torch.device) -> Routed:
    """Compute the inputs of a block's experts for all windows; the hidden states are in the new file `path`."""
    windows, length, width = inputs.tensor.shape
    store: Tensor | None = None
    chosen: list[Tensor] = []
    first = 0
    for _, hidden in inputs.batches(device):
        batch = routed_batch(block, experts, call, hidden)
        if store is None:
            width = batch.hidden.shape[-1]
            store = Activations(path, (windows * length, width), create=True).tensor
        if first + len(batch.hidden) > len(store):
            raise AfpqError(f"{experts}: gets more tokens than there are; use --method rtn")
        store[first : first + len(batch.hidden)] = batch.hidden.cpu()
        chosen.append(batch.chosen.cpu())
        first += len(batch.hidden)
    assert store is not None
    return Routed(store[:first], torch.cat(chosen))
