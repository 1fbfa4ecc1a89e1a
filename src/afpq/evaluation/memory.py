# SPDX-License-Identifier: MIT
"""Measure the free memory of the system, the container and the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")  # lines of hierarchy:controllers:path
_CGROUP = Path("/sys/fs/cgroup")  # limits of containers

# (files of the limit, of the bytes in use; the key in memory.stat of the page cache that is freed when it is needed)
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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
    """Return the least that any group of processes around this one may still allocate."""
    return min((_left_in(group, files) for group, files in _groups()), default=2**63)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the directories of this process's memory groups up to their root, with the names of their files."""
    try:
        lines = [line.split(":", 2) for line in _MEMBERSHIP.read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    paths = [(controllers, path) for _, controllers, path in (line for line in lines if len(line) == 3)]
    version1 = next((path for controllers, path in paths if "memory" in controllers.split(",")), "/")
    version2 = next((path for controllers, path in paths if not controllers), "/")
    for root, path, files in ((_CGROUP / "memory", version1, _V1), (_CGROUP, version2, _V2)):
        # In a container the path may be that of the host, which is not there: then only its root is.
        place = PurePosixPath(path.lstrip("/"))
        for inside in (place, *place.parents):
            if ".." not in inside.parts:
                yield root / inside, files


def _left_in(group: Path, files: tuple[str, str, str]) -> int:
    limit_file, used_file, freed = files
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_file, used_file))
        left = int(limit) - int(used)  # "max" is no number: no limit
    except (OSError, ValueError):
        return 2**63
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return left + int(statistics[freed])
    except (OSError, KeyError, ValueError):
        return left
