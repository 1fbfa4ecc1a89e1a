# SPDX-License-Identifier: MIT
"""One run at a time in a directory: real processes, killed in every way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import afpq.checkpoint.lock
from afpq import AfpqError
from afpq.checkpoint.lock import LOCK, Lock, locked

# lock.py and errors.py without the rest of the package, whose imports take seconds
BARE = f"""
import sys, time, types
from pathlib import Path
package = types.ModuleType("afpq")
package.__path__ = {[str(Path(afpq.checkpoint.lock.__file__).parents[1])]}
sys.modules["afpq"] = package
from afpq.errors import AfpqError
from afpq.checkpoint.lock import locked
"""
HOLD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
COUNT = """
place, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(200):
    try:
        with locked(place):
            before = int(counter.read_text())
            time.sleep(0.0002)
            counter.write_text(str(before + 1))
            print("+")
    except AfpqError:
        pass
"""


def holder(directory: Path) -> subprocess.Popen[str]:
    """A process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", BARE + HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_held_directory_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    process = holder(tmp_path / "deep" / "place")
    with pytest.raises(AfpqError, match=rf"process {process.pid} on {os.uname().nodename}, since") as error:
        Lock(tmp_path / "deep" / "place")
    assert str(tmp_path / "deep" / "place") in str(error.value)
    process.communicate("")
    assert list((tmp_path / "deep" / "place").iterdir()) == []
    with locked(tmp_path / "deep" / "place"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_no_lock(tmp_path: Path, number: signal.Signals) -> None:
    process = holder(tmp_path)
    process.send_signal(number)
    process.communicate()
    assert process.returncode != 0
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_whose_file_was_renamed_or_removed_does_not_count(tmp_path: Path) -> None:
    """As a directory that is published while another run waits at its door."""
    process = holder(tmp_path / "partial")
    os.replace(tmp_path / "partial", tmp_path / "out")
    with locked(tmp_path / "partial"):
        assert (tmp_path / "partial" / LOCK).exists() and (tmp_path / "out" / LOCK).exists()
    end(process)


def test_a_lock_is_released_once(tmp_path: Path) -> None:
    """A second release must not close, or remove, what somebody else has opened since."""
    lock = Lock(tmp_path)
    lock.release(tmp_path)
    with locked(tmp_path):
        lock.release(tmp_path)
        with pytest.raises(AfpqError, match="works in it"):
            Lock(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": "x"}', b"\xff" * 2000])
def test_a_holder_that_says_nonsense_is_another_run(tmp_path: Path, content: bytes) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(AfpqError, match="another run works in it"):
            Lock(tmp_path)


def test_many_processes_take_turns(tmp_path: Path) -> None:
    """Each unlinks the file it locks, which is where such locks go wrong: two holders at once would lose counts."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", BARE + COUNT, str(tmp_path / "place"), str(counter)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(text.count("+") for text in said) == int(counter.read_text()) > 0


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="no second run"), locked(tmp_path):
        pass
