# SPDX-License-Identifier: MIT
"""Hidden states of all calibration windows, in a file, and the batches they are read in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from afpq.errors import AfpqError

BLOCK_BATCH_TOKENS = 4096  # that run through a block at once


class Inputs(Protocol):
    """Hidden states that enter a block; a batch of them is tensor[rows]."""

    @property
    def tensor(self) -> Tensor: ...

    def batches(self, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """Yield (rows, tensor[rows] on the device)."""
        ...


class Activations:
    """Hidden states of all windows, [windows, length, width] float32, mapped from a file: memory can be reclaimed."""

    def __init__(self, path: Path, shape: tuple[int, ...], create: bool) -> None:
        self.path, size = path, torch.Size(shape).numel()
        if create:
            _reserve(path, 4 * size)
        elif not path.exists() or path.stat().st_size != 4 * size:
            raise AfpqError(f"{path}: missing or of another size; start again with --no-resume")
        self.tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def batches(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Yield (windows, their hidden states) in batches of equal size."""
        size = batch_size(*self.tensor.shape[:2])
        for first in range(0, len(self.tensor), size):
            rows = slice(first, first + size)
            yield rows, self.tensor[rows].to(device)

    def sample(self, device: torch.device) -> Tensor:
        """Return one batch of windows spread evenly over all, for searches with many forward passes."""
        size = batch_size(*self.tensor.shape[:2])
        return self.tensor[torch.linspace(0, len(self.tensor) - 1, size).round().long()].to(device)


def _reserve(path: Path, size: int) -> None:
    """Create a file of zeros with its disk blocks allocated. Raises OSError if the disk is too small.

    A sparse file gets its blocks when it is written; if the disk is full by then, writing to its memory map ends the
    process with SIGBUS.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for first in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - first)))


def batch_size(windows: int, length: int) -> int:
    """Windows in a batch: at most BLOCK_BATCH_TOKENS, and a divisor of all, since calls are recorded for one size."""
    most = max(1, BLOCK_BATCH_TOKENS // length)
    return max(size for size in range(1, most + 1) if windows % size == 0)
