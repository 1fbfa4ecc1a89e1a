# SPDX-License-Identifier: MIT
"""Writing checkpoints: exact files, and nothing that looks complete when the writing went wrong."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from afpq import AfpqError
from afpq.checkpoint.reader import INDEX, WEIGHTS, open_checkpoint
from afpq.checkpoint.work_directory import work_directory
from afpq.checkpoint.writer import ShardWriter
from afpq.numerics.packing import Spec

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, which compare equal for NaN too."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes seen as `dtype`: NaN, Inf and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize * torch.Size(shape).numel()
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def specs_of(tensors: dict[str, Tensor]) -> dict[str, Spec]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(directory: Path, tensors: dict[str, Tensor], max_shard: int = 10**9, backwards: bool = False) -> None:
    with ShardWriter(directory, specs_of(tensors), max_shard) as writer:
        for name in sorted(tensors, reverse=backwards):
            writer.write(name, tensors[name])


def read(directory: Path) -> dict[str, Tensor]:
    """All tensors, found as Transformers finds them: one file, or the files of the index."""
    if not (directory / INDEX).exists():
        return load_file(directory / WEIGHTS)
    weight_map: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in set(weight_map.values())}
    assert sorted(weight_map) == sorted(name for tensors in files.values() for name in tensors)
    return {name: files[file][name] for name, file in weight_map.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert specs_of(found) == specs_of(expected)
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in expected.items())


some_specs = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)), min_size=1, max_size=8
)


@given(some_specs, st.integers(1, 400), st.booleans())
@settings(max_examples=60)
def test_files_hold_exactly_the_input(specs: list[Spec], max_shard: int, backwards: bool) -> None:
    tensors = {f"layer.{i}.ünï": random_tensor(*spec, seed=i) for i, spec in enumerate(specs)}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), tensors, max_shard, backwards)
        assert_same(read(Path(name)), tensors)


@given(some_specs, st.integers(1, 400))
@settings(max_examples=40)
def test_shards_stay_below_the_limit_and_are_indexed(specs: list[Spec], max_shard: int) -> None:
    tensors = {f"t{i}": random_tensor(*spec, seed=i) for i, spec in enumerate(specs)}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), tensors, max_shard)
        files = sorted(Path(name).glob("*.safetensors"))
        loaded = [load_file(file) for file in files]
        for shard in loaded:
            assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard
        if len(files) == 1:
            assert files[0].name == WEIGHTS and not (Path(name) / INDEX).exists()
        else:
            count = len(files)
            assert [f.name for f in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
            total = json.loads((Path(name) / INDEX).read_text())["metadata"]["total_size"]
            assert total == sum(t.nbytes for t in tensors.values())


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.arange(10)[::3], "c": torch.ones(1, 3).expand(2, 3)}
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / WEIGHTS), tensors)


def test_data_is_aligned(tmp_path: Path) -> None:
    for length in range(1, 9):
        write(tmp_path, {"x" * length: torch.zeros(3)})
        header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
        assert header % 8 == 0


def test_transformers_loads_the_shards(make_model: ModelMaker, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tensors, 50_000)
    shutil.copy(source / "config.json", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict(), tensors)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_same({name: checkpoint.read(name) for name in checkpoint.tensors}, tensors)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 2), torch.zeros(2, 3).half(), torch.zeros(6), torch.zeros(2, 3, 1)], ids=str
)
def test_a_tensor_unlike_its_announcement_is_an_error(tmp_path: Path, wrong: Tensor) -> None:
    with pytest.raises(AfpqError, match=r"layer\.weight"):
        with ShardWriter(tmp_path, {"layer.weight": (torch.float32, (2, 3))}) as writer:
            writer.write("layer.weight", wrong)


def test_a_tensor_never_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="forgotten"):
        with ShardWriter(tmp_path, {"a": (torch.float32, (2,)), "forgotten": (torch.float32, (2,))}) as writer:
            writer.write("a", torch.zeros(2))


def test_an_error_inside_the_writer_is_not_masked(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with ShardWriter(tmp_path, {"a": (torch.float32, (2,))}):
            raise ZeroDivisionError


@given(some_specs, st.integers(1, 400), st.integers(0, 8))
@settings(max_examples=40)
def test_a_writer_goes_on_where_another_was_killed(specs: list[Spec], max_shard: int, finished: int) -> None:
    tensors = {f"t{i}": random_tensor(*spec, seed=i) for i, spec in enumerate(specs)}
    first = list(tensors)[:finished]
    with tempfile.TemporaryDirectory() as name:
        with contextlib.suppress(KeyboardInterrupt), ShardWriter(Path(name), specs_of(tensors), max_shard) as writer:
            for key in first:
                writer.write(key, tensors[key])
            writer.sync()
            if len(first) < len(tensors):
                raise KeyboardInterrupt
        with ShardWriter(Path(name), specs_of(tensors), max_shard, written=first) as writer:
            for key in list(tensors)[finished:]:
                writer.write(key, tensors[key])
        assert_same(read(Path(name)), tensors)


class FullDisk:
    """An `open` whose files together hold `space` bytes; it remembers them."""

    def __init__(self, space: int) -> None:
        self.space = space
        self.files: list[io.BufferedWriter] = []

    def __call__(self, path: Path, mode: str) -> io.BufferedWriter:
        disk = self

        class File(io.BufferedWriter):
            def write(self, data: Any) -> int:
                disk.space -= memoryview(data).nbytes
                if disk.space < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        self.files.append(File(io.FileIO(path, mode)))
        return self.files[-1]


@pytest.mark.parametrize("space", [0, 100, 300, 1500])
def test_a_disk_that_fills_up_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: int
) -> None:
    disk = FullDisk(space)
    monkeypatch.setattr("afpq.checkpoint.writer.open", disk, raising=False)
    with pytest.raises(AfpqError, match="No space left"):
        with work_directory(tmp_path / "out", 10, {}, resume=True) as work:
            write(work.path, {"a": torch.ones(200), "b": torch.ones(200)}, max_shard=800)
    assert list(tmp_path.iterdir()) == []
    forgotten = [file for file in disk.files if not file.closed]
    for file in forgotten:
        file.raw.close()
    assert disk.files and not forgotten
