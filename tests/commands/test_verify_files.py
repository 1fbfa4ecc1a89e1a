# SPDX-License-Identifier: MIT
"""`afpq verify`: what it prints, its exit codes, and its JSON."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_config, edit_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import afpq
from afpq.checkpoint.checksums import CHECKSUMS
from afpq.cli import main

NORM = "model.layers.1.input_layernorm.weight"


def run(*arguments: object) -> int:
    """Exit code of `afpq verify ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["afpq", "verify", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    afpq.quantize(tiny_model_dir, out)
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def test_an_intact_directory(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(written, "--json", tmp_path / "result.json") == 0
    result: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    printed = capsys.readouterr()
    assert f"all {result['tensors']} tensors are as they were written" in printed.out and not printed.err
    assert result["intact"] is True and result["differences"] == [] and result["model"] == str(written)


def test_one_difference_names_tensor_and_file(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(copied, lambda tensors: tensors[NORM][3].neg_())
    assert run(copied, "--json", tmp_path / "result.json") == 2
    error = capsys.readouterr().err
    assert error.count(NORM) == 1 and "model.safetensors" in error and "is not as it was written" in error
    (difference,) = json.loads((tmp_path / "result.json").read_text())["differences"]
    assert difference == {
        "name": f"tensor {NORM}", "file": "model.safetensors", "reason": "is not as it was written"
    }  # fmt: skip


def test_many_differences_are_cut(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(copied, lambda t: t.update({f"extra\x1b{i}": torch.zeros(1) for i in range(30)}))
    assert run(copied) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and "30 in all" in lines[-1] and "\x1b" not in "".join(lines)


def test_a_changed_config(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = json.loads((copied / "config.json").read_text())["quantization_config"]
    edit_config(copied, quantization_config={**keys, "group_size": 32})
    assert run(copied) == 2
    assert "config.json: quantization_config.group_size was changed" in capsys.readouterr().err


def test_a_directory_without_checksums(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / CHECKSUMS).unlink()
    assert run(copied) == 2
    assert f"has no {CHECKSUMS}" in capsys.readouterr().err


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_changed_byte_of_the_file_of_weights_is_exit_code_2(
    written: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Of its data; a header that is damaged is an error of the reader, or another name, dtype or shape."""
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(written, copy)
    content = bytearray((written / "model.safetensors").read_bytes())
    place = data.draw(st.integers(8 + int.from_bytes(content[:8], "little"), len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (copy / "model.safetensors").write_bytes(content)
    assert run(copy) == 2
