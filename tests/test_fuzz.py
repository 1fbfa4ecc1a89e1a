# SPDX-License-Identifier: MIT
"""Damaged checkpoints and operands that do not fit: an AfpqError, or the right numbers; never anything else.

A few hundred inputs by default; `-m slow` lets Atheris look for more, and runs the kernels under AddressSanitizer.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fuzz_ops
import fuzzing
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_build import AVX2, COMPILER
from safetensors.torch import load_file, save_file

from afpq import AfpqError
from afpq.checkpoint.reader import WEIGHTS
from afpq.evaluation.loading import load_model

TESTS = Path(__file__).parent
many = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
few = settings(many, max_examples=12)
pytestmark = pytest.mark.filterwarnings("ignore")  # what foreign files make foreign code warn of


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Of no test alone: one directory is damaged again and again, in memory where that is possible."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def seeds(place: Path) -> tuple[fuzzing.Files, list[fuzzing.Files]]:
    return fuzzing.make_seeds(place / "seeds")


def dice_of(data: st.DataObject) -> fuzzing.Dice:
    return lambda n: data.draw(st.integers(0, n - 1))


def test_what_is_not_damaged_is_loaded_and_right(place: Path, seeds: tuple[fuzzing.Files, list[fuzzing.Files]]) -> None:
    for files in seeds[1]:
        fuzzing.write(files, place / "model")
        assert fuzzing.judge_quantized(place / "model", direct=True) == ("loaded and right", "")


def test_the_judge_sees_wrong_numbers(place: Path, seeds: tuple[fuzzing.Files, list[fuzzing.Files]]) -> None:
    fuzzing.write(seeds[1][0], place / "model")
    model = load_model(place / "model", device="cpu")
    tensors = load_file(place / "model" / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.qweight"][3, 5] ^= 16
    save_file(tensors, place / "model" / WEIGHTS)
    with pytest.raises(AssertionError, match="up_proj"):
        fuzzing.check_model(model, place / "model")


@many
@given(st.data())
def test_a_damaged_quantized_checkpoint_is_refused_or_loaded_right(
    place: Path, seeds: tuple[fuzzing.Files, list[fuzzing.Files]], data: st.DataObject
) -> None:
    dice = dice_of(data)
    fuzzing.write(fuzzing.damage(fuzzing.pick(dice, seeds[1]), dice), place / "model")
    fuzzing.judge_quantized(place / "model", direct=dice(4) == 0)


@few
@given(st.data())
def test_a_damaged_float_checkpoint_is_refused_or_quantized_right(
    place: Path, seeds: tuple[fuzzing.Files, list[fuzzing.Files]], data: st.DataObject
) -> None:
    fuzzing.write(fuzzing.damage(seeds[0], dice_of(data)), place / "model")
    fuzzing.judge_float(place / "model", place / "out")


@settings(many, max_examples=200)
@given(st.data(), st.integers(0, 3))
def test_operands_that_do_not_fit_are_refused_or_computed_right(data: st.DataObject, changes: int) -> None:
    dice = dice_of(data)
    call = fuzz_ops.make_call(dice)
    for _ in range(changes):
        call = fuzz_ops.spoil(call, dice)
    fuzz_ops.judge(call)


@pytest.mark.parametrize(("length", "shape"), [(3, (4,)), (5, (4,)), (1, (4,)), (4, (1, 4)), (4, (2, 2))])
def test_a_bias_of_another_length_is_refused(length: int, shape: tuple[int, ...]) -> None:
    """Native code would read behind its end."""
    bias = torch.zeros(length) if shape == (4,) else torch.zeros(shape)
    qweight, scales = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1)
    for x in (torch.ones(1, 32), torch.ones(1, 32, dtype=torch.float64)):  # natively, and by the reference
        with pytest.raises(AfpqError, match="bias"):
            torch.ops.afpq.linear(x, qweight, scales, None, None, None, bias, [-1.0, 1.0], 4, 32)


# ---- more of it


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "runs"), [("quantized", 2000), ("float", 200)])
def test_inputs_that_atheris_chooses(kind: str, runs: int, tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "fuzz_loader.py"), kind, f"-runs={runs}", "-seed=1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert f"{runs} inputs:" in result.stdout
    assert "refused" in result.stdout and " and right" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux" or platform.machine() != "x86_64", reason="needs g++, Linux, x86"
)
def test_no_operands_make_the_kernels_read_outside_of_a_tensor(tmp_path: Path) -> None:
    """A library under AddressSanitizer in place of the package's; torch's memory is watched too."""
    root = TESTS.parent
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fsanitize=address"]
    objects = []
    for source in sorted((root / "csrc").glob("**/*.cpp")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        extra = AVX2 if source.stem.startswith("avx2") else []
        subprocess.run([str(COMPILER), *flags, *extra, "-c", str(source), "-o", objects[-1]], check=True)
    library = tmp_path / "checked.so"
    subprocess.run([str(COMPILER), "-shared", "-fsanitize=address", *objects, "-o", str(library)], check=True)
    found = [
        subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LIBRARY": str(library),
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    }
    command = [sys.executable, "-W", "ignore", str(TESTS / "fuzz_ops.py"), "5000", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert "5000 inputs" in result.stdout
