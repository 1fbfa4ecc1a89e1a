# SPDX-License-Identifier: MIT
"""A checkpoint made from another appears whole and checked, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from afpq.checkpoint.reader import CARD, WEIGHTS, Checkpoint, open_checkpoint
from afpq.errors import AfpqError
from afpq.jobs.rewrite import Rewrite, rewrite

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.arange(4).to(torch.uint8)}


@pytest.fixture
def job(tiny_model_dir: Path) -> Rewrite:
    """The tiny model's companions around two other tensors."""
    source = open_checkpoint(tiny_model_dir)
    outputs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    return Rewrite(source, outputs, {**source.config, "made": "anew"}, "# A card\n")


def test_the_result_is_the_tensors_the_config_the_card_and_the_companions(job: Rewrite, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    rewrite(job, tmp_path / "out", TENSORS.items(), lambda *call: calls.append(call))
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert written.keys() == TENSORS.keys() and all(torch.equal(written[name], TENSORS[name]) for name in TENSORS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["made"] == "anew"
    companions = {path.name: path.read_bytes() for path in job.source.companions()}
    assert companions and companions.items() <= {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}.items()
    assert (tmp_path / "out" / CARD).read_text() == "# A card\n"
    assert calls == [("b", 24, 28), ("a", 28, 28)] and job.output_bytes == 28
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_check_reads_the_finished_checkpoint_before_it_has_its_name(job: Rewrite, tmp_path: Path) -> None:
    def check(written: Checkpoint, digests: Mapping[str, str]) -> str:
        assert set(digests) == set(TENSORS)
        assert written.config["made"] == "anew" and torch.equal(written.read("b"), TENSORS["b"])
        assert not (tmp_path / "out").exists()
        return "right"

    assert rewrite(job, tmp_path / "out", TENSORS.items(), check=check) == "right"
    assert rewrite(job, tmp_path / "unchecked", TENSORS.items()) == ""


def failing() -> Iterator[tuple[str, Tensor]]:
    yield "b", TENSORS["b"]
    raise AfpqError("the source is damaged")


def refuse(*_: object) -> str:
    raise AfpqError("wrong logits")


@pytest.mark.parametrize(
    ("case", "words"),
    [("damaged", "the source is damaged"), ("too few", "a"), ("another shape", "b"), ("check", "wrong logits")],
)
def test_whatever_fails_leaves_nothing(job: Rewrite, tmp_path: Path, case: str, words: str) -> None:
    tensors = {
        "damaged": failing(),
        "too few": [("b", TENSORS["b"])],
        "another shape": [("b", TENSORS["b"].T), ("a", TENSORS["a"])],
        "check": TENSORS.items(),
    }[case]
    with pytest.raises(AfpqError, match=words):
        rewrite(job, tmp_path / "out", tensors, check=refuse if case == "check" else None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_left_alone(job: Rewrite, tmp_path: Path) -> None:
    rewrite(job, tmp_path / "out", TENSORS.items())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(AfpqError, match="exists already"):
        rewrite(replace(job, card="# Another\n"), tmp_path / "out", TENSORS.items())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
