# SPDX-License-Identifier: MIT
"""The command line in tests: run in this process or as one of its own, refused with one line, and its JSON."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

import afpq
from afpq.checkpoint.reader import WEIGHTS
from afpq.cli import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


TEXT = "The quick brown fox jumps over the lazy dog; größer als nötig.\n" * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, "utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run `afpq ARGUMENTS` in this process."""

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["afpq", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        return Result(code, *capsys.readouterr())

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """`afpq ARGUMENTS` as a process of its own."""
    command = [sys.executable, "-m", "afpq", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, **{"preexec_fn": _hear_interrupts, **options})


def _hear_interrupts() -> None:
    """A shell starts background jobs deaf to SIGINT, and their children inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=250)
    return Result(process.returncode, out, err)


def assert_refused(result: Result, *words: str) -> None:
    """Exit code 2 and one line of standard error, which names the culprit."""
    assert result.code == 2, result
    assert result.out == ""
    assert re.fullmatch(r"afpq: [^\n]+\n", result.err), result.err
    assert "Traceback" not in result.err
    assert all(word in result.err for word in words), result.err


def read_json(path: Path) -> Any:
    """Strictly: NaN and Infinity, which Python writes, are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def packed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as nf3-asym-g64, for tests that only read it."""
    out = tmp_path_factory.mktemp("packed") / "nf3"
    afpq.quantize(tiny_model_dir, out, "nf3-asym-g64")
    return out


def with_nan(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
