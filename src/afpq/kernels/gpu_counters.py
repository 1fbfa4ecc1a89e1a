# SPDX-License-Identifier: MIT
"""Counters of GPU programs that share a tile of the result: zeros, which kernels leave as zeros.

Each stream has its own, since its calls run one after the other, and so has each call in a captured graph, since its
graph may run at any time.
"""

from __future__ import annotations

import torch
from torch import Tensor

ARENA = 1 << 20  # counters for captured graphs: 4 MiB


class Counters:
    """The counters of one device, int32.

    Attributes:
        arena: [ARENA], handed out once and never taken back: captured graphs hold addresses.
        used: how many of the arena are handed out.
        streams: the counters of each stream, by its handle.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.used = device, 0
        self.arena = torch.zeros(ARENA, dtype=torch.int32, device=device)
        self.streams: dict[int, Tensor] = {}

    def of_stream(self, stream: int, count: int) -> Tensor:
        """Return at least `count` counters for calls of a stream that run now."""
        counters = self.streams.get(stream)
        if counters is None or len(counters) < count:
            counters = self.streams[stream] = self.fresh(max(count, 1024))
        return counters

    def fresh(self, count: int) -> Tensor:
        """Return `count` private counters, for a call in a captured graph."""
        if self.used + count > ARENA:
            return torch.zeros(count, dtype=torch.int32, device=self.device)
        self.used += count
        return self.arena[self.used - count : self.used]


_counters: dict[torch.device, Counters] = {}


def reserve(device: torch.device) -> None:
    """Allocate the counters of a device, unless they exist."""
    if device not in _counters:
        _counters[device] = Counters(device)


def counters_for(device: torch.device, count: int) -> Tensor:
    """Return at least `count` counters, int32 zeros, for a call on the current stream of a device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing and device not in _counters:  # a graph's memory is not filled before it runs: no use to other calls
        return torch.zeros(count, dtype=torch.int32, device=device)
    reserve(device)
    if capturing:
        return _counters[device].fresh(count)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters[device].of_stream(stream, count)
