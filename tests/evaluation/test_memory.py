# SPDX-License-Identifier: MIT
"""Free memory: as the system tells, or as the container allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afpq.evaluation import memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 MB free, without containers."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_as_the_system_tells(machine: Path) -> None:
    assert memory.available_memory() == 8000 * 1024


@pytest.mark.parametrize(("limit", "free"), [("max", 8_192_000), ("3000", 1000), ("1000", 0), ("99000000", 8_192_000)])
def test_as_the_container_allows(machine: Path, limit: str, free: int) -> None:
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text("2000\n")
    assert memory.available_memory() == free


def test_half_of_the_machine_where_no_one_tells(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "meminfo").unlink()
    assert memory.available_memory() > 0

    def unknown(_: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("afpq.evaluation.memory.os.sysconf", unknown)
    assert memory.available_memory() == 0


@pytest.mark.parametrize(("on_the_gpu", "free"), [(1000, 1000), (99_000_000, 8_192_000)])
def test_a_gpu_takes_no_more_than_there_is_to_load_it_from(
    machine: Path, monkeypatch: pytest.MonkeyPatch, on_the_gpu: int, free: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (on_the_gpu, 10**12))
    assert memory.available_device_memory(torch.device("cuda")) == free
