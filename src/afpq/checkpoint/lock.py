# SPDX-License-Identifier: MIT
"""One run at a time in a directory: a lock the kernel drops with the process that holds it, however that ends.

The lock is `flock` on a file in the directory, held by an open file: a killed run leaves a file behind but no lock. The
file goes away while it is still locked, so whoever has just locked a file asks whether it is still the one in the
directory. Over NFS, Linux makes a byte-range lock of it, which other machines see too.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from afpq.errors import AfpqError

LOCK = "afpq.lock"
_UNKNOWN = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # a file system without locks
_TRIES = 100


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, made where it is not there. Raises AfpqError where another run holds it; OSError as `open`."""
    lock = Lock(directory)
    try:
        yield
    finally:
        lock.release(directory)


class Lock:
    """Of a directory, from now until `release`."""

    def __init__(self, directory: Path) -> None:
        for _ in range(_TRIES):
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / LOCK
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # the run before has just renamed or removed the directory
                continue
            try:
                _take(self._file, directory)
                if _is_at(self._file, path):
                    os.ftruncate(self._file, 0)
                    os.write(self._file, _who_we_are())
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        raise AfpqError(f"{directory}: other runs keep taking it; wait for them, or choose another place")

    def release(self, directory: Path) -> None:
        """Let go, if that has not been done; `directory` is where the lock's file is by now, which goes first."""
        if self._file < 0:
            return
        with suppress(OSError):
            if _is_at(self._file, directory / LOCK):
                (directory / LOCK).unlink()
        os.close(self._file)
        self._file = -1


def _take(file: int, directory: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(file, 1000, 0))
        raise AfpqError(f"{directory}: {holder} works in it; wait for that run, or choose another place") from None
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        warnings.warn(f"{directory}: no locks on this file system; start no second run there", stacklevel=2)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _who_we_are() -> bytes:
    return json.dumps({"process": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%H:%M")}).encode()


def _holder(content: bytes) -> str:
    """In words."""
    try:
        who = json.loads(content)
        return f"process {int(who['process'])} on {str(who['host'])[:80]}, since {str(who['since'])[:20]},"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"
