# SPDX-License-Identifier: MIT
"""Free memory: as the system reports, or as the container allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afpq.evaluation import memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 MB free, without containers."""
    (tmp_path / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def test_as_the_system_tells(machine: Path) -> None:
    assert memory.available_memory() == 8000 * 1024


@pytest.mark.parametrize(("limit", "free"), [("max", 8_192_000), ("3000", 1000), ("1000", 0), ("99000000", 8_192_000)])
def test_as_the_container_allows(machine: Path, limit: str, free: int) -> None:
    (machine / "memory.max").write_text(f"{limit}\n")
    (machine / "memory.current").write_text("2000\n")
    assert memory.available_memory() == free


def group(place: Path, limit: str, used: int, cache: int | None = None, version: int = 2) -> None:
    """A control group's files; `cache` is what the kernel frees when it is needed."""
    place.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used)):
        (place / name).write_text(f"{value}\n")
    if cache is not None:
        key = "inactive_file" if version == 2 else "total_inactive_file"
        (place / "memory.stat").write_text(f"anon 5\nactive_file 7\n{key} {cache}\nslab 3\n")


def test_page_cache_is_free_memory(machine: Path) -> None:
    """After a large checkpoint was read, most of what is in use is its pages."""
    group(machine, "1000000", 990_000, 600_000)
    assert memory.available_memory() == 610_000


def test_a_group_without_statistics_is_taken_at_its_word(machine: Path) -> None:
    group(machine, "1000000", 990_000)
    assert memory.available_memory() == 10_000
    (machine / "memory.stat").write_text("anon 5\nnot two words here\n")
    assert memory.available_memory() == 10_000


@given(limits=st.lists(st.none() | st.integers(1000, 10**7), min_size=3, max_size=3))
def test_the_tightest_of_nested_groups_counts(
    tmp_path_factory: pytest.TempPathFactory, limits: list[int | None]
) -> None:
    place = tmp_path_factory.mktemp("nested")
    for inside, limit in zip(("", "user.slice", "user.slice/job 1.scope"), limits):
        group(place / inside, "max" if limit is None else str(limit), 900, 100)
    group(place / "other.slice", "1000", 1000, 0)  # not around this process
    (place / "membership").write_text("0::/user.slice/job 1.scope\n")
    (place / "meminfo").write_text("MemAvailable: 8000 kB\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, file in (("_MEMINFO", "meminfo"), ("_CGROUP", ""), ("_MEMBERSHIP", "membership")):
            patch.setattr(memory, name, place / file)
        left = [limit - 800 for limit in limits if limit is not None]
        assert memory.available_memory() == min([8000 * 1024, *left])


def test_version_1_of_the_groups(machine: Path) -> None:
    group(machine / "memory", str(2**63 - 4096), 10**6, 0, version=1)
    group(machine / "memory" / "docker" / "1234", "3000000", 2_500_000, 400_000, version=1)
    (machine / "membership").write_text("9:name=systemd:/\n4:cpu,memory:/docker/1234\n0::/\n")
    assert memory.available_memory() == 900_000


def test_a_path_of_the_host_leaves_the_container_s_own_root(machine: Path) -> None:
    group(machine, "1000000", 990_000, 600_000)
    for line in ("0::/kubepods/pod1/1234\n", "0::/../../elsewhere\n", "nonsense\n"):
        (machine / "membership").write_text(line)
        assert memory.available_memory() == 610_000


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
