# SPDX-License-Identifier: MIT
"""One run at a time in a directory: a lock the kernel drops with the process that holds it, however that ends.

The lock is `flock` on a file in the directory, held by an open file: a killed run leaves a file behind but no lock. The
file goes away while it is still locked, so after locking a file it is checked that this is still the one in the
directory. Over NFS, Linux makes a byte-range lock of it, which other machines see too.

The package filelock checks only that the file has not been removed, and so holds the file of a directory that was
renamed in between. Before its version 4, a refused process also erased the holder's name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from afpq.errors import AfpqError

LOCK = "afpq.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system
_TRIES = 100


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory, created if missing. Raises AfpqError if another run holds it; OSError as `open`."""
    lock = Lock(directory)
    try:
        yield
    finally:
        lock.release(directory)


class Lock:
    """A lock of a directory, from its creation until `release`."""

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
                    os.write(self._file, _this_process())
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
        raise AfpqError(f"{directory}: other runs keep taking it; wait for them, or choose another place")

    def release(self, directory: Path) -> None:
        """Release the lock once; `directory` is where the lock's file is by now, which is removed first."""
        if self._file < 0:
            return
        with suppress(OSError):
            if _is_at(self._file, directory / LOCK):
                (directory / LOCK).unlink()
        os.close(self._file)
        self._file = -1


def _take(file: int, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(os.pread(file, 1000, 0))
        raise AfpqError(f"{directory}: {holder} works in it; wait for that run, or choose another place") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{directory}: no locks on this file system; start no second run there", stacklevel=2)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> bytes:
    return json.dumps({"process": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%H:%M")}).encode()


def _holder(content: bytes) -> str:
    """Describe the process that wrote a lock's file."""
    try:
        who = json.loads(content)
        return f"process {int(who['process'])} on {str(who['host'])[:80]}, since {str(who['since'])[:20]},"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"
