# SPDX-License-Identifier: MIT
"""Measure the free memory of the system, the container and the GPU."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # a container's own limit


def available_memory() -> int:
    """Return the bytes of free memory; half of the installed memory if the system does not report it, else 0."""
    return max(0, min(_free_in_system(), _left_in_container()))


def available_device_memory(device: torch.device) -> int:
    """Return the free bytes of the GPU, at most those of main memory: Transformers loads models there first."""
    free: int = torch.cuda.mem_get_info(device)[0]
    return min(free, available_memory())


def _free_in_system() -> int:
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].removesuffix("kB")) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (OSError, ValueError):
            return 0


def _left_in_container() -> int:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)  # "max" is no number: no limit
    except (OSError, ValueError):
        return 2**63
