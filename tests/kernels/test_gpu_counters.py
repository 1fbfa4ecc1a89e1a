# SPDX-License-Identifier: MIT
"""Counters of GPU programs are zero, and shared by no two calls that may run at once."""

from __future__ import annotations

import pytest
import torch

from afpq.kernels import gpu_counters
from afpq.kernels.gpu_counters import ARENA, Counters, counters_for, reserve


def test_calls_in_graphs_have_their_own_counters(device: torch.device) -> None:
    counters = Counters(device)
    first, second = counters.fresh(3), counters.fresh(5)
    first += 1
    assert len(second) == 5 and not second.any()
    rest = counters.fresh(ARENA)  # more than are left
    assert len(rest) == ARENA and not rest.any()
    assert counters.of_stream(7, 10).data_ptr() == counters.of_stream(7, 20).data_ptr()
    assert counters.of_stream(7, 10).data_ptr() != counters.of_stream(8, 10).data_ptr()
    assert len(counters.of_stream(7, 5000)) == 5000


def test_a_device_has_one_set_of_counters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_counters, "_counters", {})
    reserve(device)
    [before] = gpu_counters._counters.values()
    first = counters_for(device, 7)
    assert len(first) >= 7 and not first.any()
    assert counters_for(device, 9).data_ptr() == first.data_ptr()  # the same stream
    reserve(device)
    assert list(gpu_counters._counters.values()) == [before]
