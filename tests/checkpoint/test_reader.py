# SPDX-License-Identifier: MIT
"""Reading checkpoints: exact tensors from whole ones, one clear error naming the file for broken ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from afpq import AfpqError
from afpq.checkpoint.reader import INDEX, WEIGHTS, open_checkpoint

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.tensor([True, False]),
    "e": torch.empty(0, 4, dtype=torch.float16),
    "f": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
}


def write_checkpoint(directory: Path, shards: dict[str, dict[str, Tensor]], index: dict[str, Any] | None) -> Path:
    """A directory with a config, the given safetensors files, and an index unless None."""
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    if index is not None:
        (directory / INDEX).write_text(json.dumps(index))
    return directory


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, of one dtype and shape."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "single", {WEIGHTS: TENSORS}, None)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    halves = {
        "one.safetensors": {n: TENSORS[n] for n in "abc"},
        "two.safetensors": {n: TENSORS[n] for n in "def"},
    }
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    return write_checkpoint(tmp_path / "sharded", halves, {"weight_map": weight_map})


@pytest.fixture(params=["single", "sharded"])
def whole(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


def test_headers_and_tensors_are_exact(whole: Path) -> None:
    checkpoint = open_checkpoint(whole)
    assert checkpoint.config == {"model_type": "llama"}
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.bytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert same(checkpoint.read(name), tensor)


def test_a_read_tensor_owns_its_memory(single: Path) -> None:
    checkpoint = open_checkpoint(str(single))
    checkpoint.read("a").fill_(9)
    assert same(checkpoint.read("a"), TENSORS["a"])


def test_transformers_shards_are_read(make_model: ModelMaker, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", max_shard_size="60KB")
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.tensors) == set(expected)
    assert all(same(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_a_single_file_comes_before_an_index_as_it_does_in_transformers(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / WEIGHTS)
    assert same(open_checkpoint(sharded).read("a"), torch.zeros(1))


def test_links_are_followed_as_the_hub_cache_needs(single: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for path in single.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    assert same(open_checkpoint(tmp_path / "links").read("a"), TENSORS["a"])


def test_files_that_the_index_does_not_name_are_not_read(sharded: Path) -> None:
    save_file({"a": torch.zeros(1), "z": torch.zeros(1)}, sharded / "training_state.safetensors")
    checkpoint = open_checkpoint(sharded)
    assert set(checkpoint.tensors) == set(TENSORS)
    assert same(checkpoint.read("a"), TENSORS["a"])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def replace_config_by_directory(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()


BROKEN_SHARDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda d: (d / "two.safetensors").unlink(), "two.safetensors"),
    "truncated data": (lambda d: truncate(d / "two.safetensors", -1), "two.safetensors"),
    "truncated header": (lambda d: truncate(d / "one.safetensors", 20), "one.safetensors"),
    "empty file": (lambda d: truncate(d / "one.safetensors", 0), "one.safetensors"),
    "not safetensors": (lambda d: (d / "one.safetensors").write_text("hello, this is no tensor"), "one.safetensors"),
    "index names an absent tensor": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].update(ghost="two.safetensors")),
        "ghost",
    ),
    "index without a map": (lambda d: (d / INDEX).write_text("{}"), INDEX),
    "index with an empty map": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), INDEX),
    "index whose map is a list": (lambda d: (d / INDEX).write_text('{"weight_map": ["a"]}'), INDEX),
    "index that maps to a number": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), INDEX),
    "index that is no JSON": (lambda d: (d / INDEX).write_text("{"), INDEX),
    "index that is a list": (lambda d: (d / INDEX).write_text("[]"), INDEX),
    "index that leads outside": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].update(a="../sharded/one.safetensors")),
        INDEX,
    ),
    "index that names a pickle": (
        lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].update(a="pytorch_model.bin")),
        INDEX,
    ),
    "tensor in two files": (lambda d: save_file(TENSORS, d / "two.safetensors"), "two.safetensors"),
    "pipe in place of a file": (lambda d: ((d / "two.safetensors").unlink(), os.mkfifo(d / "two.safetensors")), "two"),
    "pipe in place of the config": (lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")), "config"),
    "config nested without end": (lambda d: (d / "config.json").write_text('{"a":' * 100_000), "config.json"),
    "config with a number of many digits": (lambda d: (d / "config.json").write_text("9" * 10_000), "config.json"),
    "config that names other weights": (
        lambda d: (d / "config.json").write_text('{"transformers_weights": "x.safetensors"}'),
        "transformers_weights",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{'a': 1}"), "config.json"),
    "config that is no object": (lambda d: (d / "config.json").write_text("3"), "config.json"),
    "config that is not UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json"),
    "config that is a directory": (replace_config_by_directory, "config.json"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDED)
def test_a_broken_checkpoint_is_an_error_that_names_the_file(sharded: Path, case: str) -> None:
    damage, culprit = BROKEN_SHARDED[case]
    damage(sharded)
    with pytest.raises(AfpqError) as error:
        open_checkpoint(sharded)
    assert culprit in str(error.value)
    assert str(sharded) in str(error.value)


def test_pickled_weights_are_refused(single: Path) -> None:
    (single / WEIGHTS).rename(single / "pytorch_model.bin")
    with pytest.raises(AfpqError, match="safetensors") as error:
        open_checkpoint(single)
    assert str(single) in str(error.value)


def test_a_file_that_shrinks_after_opening_is_an_error(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    truncate(single / WEIGHTS, -8)
    with pytest.raises(AfpqError, match=WEIGHTS):
        checkpoint.read("a")


def test_a_file_is_no_checkpoint(single: Path) -> None:
    with pytest.raises(AfpqError, match=r"config\.json"):
        open_checkpoint(single / WEIGHTS)


@pytest.mark.parametrize(
    "name", ["", "/no/such/dir", "./no", "~/no", "no/such/dir", "nobody/nothing", "a b c!", "--x", "a" * 300, "a\0b"]
)
def test_nonsense_names_are_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AfpqError):
        open_checkpoint(name)


def test_companions_are_the_small_files_beside_the_weights(whole: Path) -> None:
    wanted = {
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "merges.txt",
        "spiece.model",
        "LICENSE",
    }
    unwanted = {"pytorch_model.bin", "optimizer.pt", "events.tfevents", "flax_model.msgpack"}
    for name in wanted | unwanted:
        (whole / name).write_text("x")
    assert {path.name for path in open_checkpoint(whole).companions()} == wanted


def test_companions_come_once_and_are_files(single: Path) -> None:
    (single / "LICENSE.txt").write_text("x")
    (single / "LICENSES").mkdir()
    assert [path.name for path in open_checkpoint(single).companions()] == ["LICENSE.txt"]
