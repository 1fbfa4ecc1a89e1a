# SPDX-License-Identifier: MIT
"""Disks that are full or read-only, at every stage: one clear error, nothing that looks finished, and a way on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli
from command_line import cli as cli  # the fixture
from conftest import ModelMaker

from afpq import AfpqError, CalibrationSettings, quantize
from afpq.calibration.hidden_states import Activations
from afpq.checkpoint.atomic_files import write_whole
from afpq.checkpoint.work_directory import JOURNAL

SIZE = 8 << 20  # bytes of the small disk
STAGES = {"rtn": (8, 130, 150), "gptq": (200, 560, 800)}  # kilobytes that are free, for the tiny model
RUN = """
import hashlib, os, shutil, sys
from pathlib import Path
from afpq import AfpqError, CalibrationSettings, quantize

disk, model, settings = Path(sys.argv[1]), sys.argv[2], CalibrationSettings(samples=8, seq_len=128)
filler, out = disk / "filler", disk / "out"
for method, kilobytes in [pair.split("=") for pair in sys.argv[3:]]:
    options = {} if method == "rtn" else {"settings": settings, "text": "some words of a text " * 200}
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, (SIZE - int(kilobytes)) * 1024)
    try:
        quantize(model, out, "nf3-asym-g32", method=method, evaluate=False, **options)
        print(method, kilobytes, "fits", flush=True)
        filler.unlink()
    except AfpqError as error:
        kept = (disk / "out.partial").exists()
        print(method, kilobytes, "kept" if kept else "gone", out.exists(), str(error), flush=True)
        filler.unlink()
        quantize(model, out, "nf3-asym-g32", method=method, evaluate=False, **options)
    weights = (out / "model.safetensors").read_bytes()
    print("weights", method, hashlib.sha256(weights).hexdigest(), (out / "config.json").exists(), flush=True)
    shutil.rmtree(out)
""".replace("SIZE", str(SIZE // 1024))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def test_a_disk_that_fills_up_at_any_stage(disk: Path, tiny_model_dir: Path) -> None:
    """With calibration, hidden states lie in memory maps: a block that is not there would end the process (SIGBUS)."""
    cases = [f"{method}={size}" for method, sizes in STAGES.items() for size in sizes]
    run = [sys.executable, "-W", "ignore", "-c", RUN, str(disk), str(tiny_model_dir), *cases]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    stopped = [line for line in lines if " kept " in line or " gone " in line]
    assert {line.split()[0] for line in stopped} == {"rtn", "gptq"}, lines
    assert any(" kept " in line for line in stopped) and any(" gone " in line for line in stopped), lines
    assert all("False" in line and ("No space left" in line or "MB free" in line) for line in stopped), stopped
    weights = [line for line in lines if line.startswith("weights")]
    assert len(weights) == len(cases) and len(set(weights)) == len(STAGES), lines


def test_memory_for_hidden_states_is_there_or_an_error(disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        Activations(disk / "states.bin", (4, 1024, 1024), create=True)
    states = Activations(disk / "fits.bin", (1, 64, 64), create=True)
    assert states.tensor.shape == (1, 64, 64) and not states.tensor.any()


def test_a_read_only_disk_is_an_error_and_a_read_only_model_is_none(
    disk: Path, make_model: ModelMaker, tmp_path: Path
) -> None:
    make_model(disk / "model")
    read_only(disk)
    with pytest.raises(AfpqError, match="Read-only"):
        quantize(disk / "model", disk / "out", "nf4-asym-g64", evaluate=False)
    quantize(disk / "model", tmp_path / "out", "nf4-asym-g64", evaluate=False)
    assert (tmp_path / "out" / "config.json").exists()


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`afpq ARGUMENTS` as a process of its own."""
    run = [sys.executable, "-W", "ignore", "-m", "afpq", *map(str, arguments)]
    return subprocess.run(run, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


def is_one_clear_error(code: int, said: str, place: object) -> bool:
    """Exit code 2, and one line that names the place."""
    lines = said.splitlines()
    return code == 2 and len(lines) == 1 and lines[0].startswith("afpq: ") and str(place) in lines[0]


def test_places_for_json_and_reports_that_cannot_be_written(
    cli: Cli, disk: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    read_only(disk)
    (tmp_path / "text").write_text("words and more words " * 200)
    for arguments in (
        ("info", tiny_model_dir, "--json", disk / "i.json"),
        ("compare", tiny_model_dir, "--schemes", "nf4-asym-g64", "--text", tmp_path / "text", "--report", disk / "r"),
    ):
        result = cli(*arguments)
        assert is_one_clear_error(result.code, result.err, disk), result


def test_a_full_device_is_one_clear_error(cli: Cli, tiny_model_dir: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    result = cli("info", tiny_model_dir, "--json", "/dev/full")
    assert is_one_clear_error(result.code, result.err, "/dev/full"), result
    with open("/dev/full", "w") as full:
        done = command("info", tiny_model_dir, stdout=full)
    assert is_one_clear_error(done.returncode, done.stderr, "No space left"), done.stderr


@pytest.mark.slow
def test_files_that_may_not_grow_are_a_full_disk_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    """For where mounting is not allowed: the same errors come from a limit on the size of files."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = command("quantize", tiny_model_dir, tmp_path / "out", preexec_fn=limit)
    assert is_one_clear_error(result.returncode, result.stderr, "File too large"), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_stays_as_it_was(disk: Path, tmp_path: Path) -> None:
    (disk / "file").write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(disk / "file", bytes(2 * SIZE))
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert (disk / "file").read_bytes() == b"before"
    (tmp_path / "link").symlink_to(disk / "file")
    write_whole(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink() and (disk / "file").read_bytes() == b"after"


def test_a_result_that_another_run_made_meanwhile_is_not_touched(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(_name: str, _done: int, _all: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "theirs").write_text("x")

    with pytest.raises(AfpqError, match="exists already"):
        quantize(tiny_model_dir, out, "nf4-asym-g64", evaluate=False, progress=appear)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert (tmp_path / "out.partial" / JOURNAL).exists()  # nothing of the work is lost
    os.replace(out, tmp_path / "theirs")
    quantize(tiny_model_dir, out, "nf4-asym-g64", evaluate=False)
    assert (out / "config.json").exists() and not (out / JOURNAL).exists()


def test_two_runs_into_one_directory(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The second is refused at once, and the first does not notice."""
    settings = CalibrationSettings(samples=4, seq_len=64)
    seen: list[str] = []

    def second(_name: str, _done: int, _all: int) -> None:
        if not seen:
            result = command("quantize", tiny_model_dir, tmp_path / "out")
            seen.append(result.stderr)
            us = f"process {os.getpid()} on {os.uname().nodename}"
            assert is_one_clear_error(result.returncode, result.stderr, us), result.stderr

    text = "a text to learn from " * 100
    quantize(
        tiny_model_dir, tmp_path / "out", "nf3-asym-g64", method="gptq", text=text, settings=settings, evaluate=False,
        progress=second,
    )  # fmt: skip
    assert seen and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path.name for path in (tmp_path / "out").iterdir() if "lock" in path.name or "journal" in path.name]
