# SPDX-License-Identifier: MIT
"""The directory a run works in: OUT.partial, renamed to OUT when all is done, with a journal to resume from.

The journal holds a fingerprint of everything that decides the result, then a line for each finished unit. A unit's line
is written after its tensors are on the disk, so the journal is right at whatever moment a run is killed; a torn last
line is dropped. One run at a time works in the directory (`lock.py`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from afpq.checkpoint.atomic_files import write_json
from afpq.checkpoint.fingerprint import differences
from afpq.checkpoint.lock import LOCK, Lock
from afpq.errors import AfpqError

JOURNAL = "afpq_journal.jsonl"
SCRATCH = "scratch"


class WorkDirectory:
    """OUT.partial during a run; `finished` maps finished units to their notes.

    `digests` holds a checksum of every tensor written, `schemes` those of learned codebooks by module, as text. `keep`:
    an AfpqError leaves the directory for a later run; not while bad input may be the reason, unless it was there.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self.finished: dict[str, list[dict[str, Any]]] = {}
        self.digests: dict[str, str] = {}
        self.schemes: dict[str, str] = {}
        self.lock = Lock(self.path)
        try:
            self._begin(fingerprint, resume)
        except BaseException:
            with suppress(OSError):
                if {path.name for path in self.path.iterdir()} <= {LOCK}:
                    self.discard()
            self.lock.release(self.path)
            raise
        self.keep = bool(self.finished)

    @property
    def scratch(self) -> Path:
        """A directory for files that are not part of the result."""
        return self.path / SCRATCH

    def finish(
        self,
        unit: str,
        notes: list[dict[str, Any]],
        digests: dict[str, str] | None = None,
        schemes: dict[str, str] | None = None,
    ) -> None:
        """Record a unit whose tensors are on the disk, with their checksums by name, and the schemes of learned
        codebooks by module, as text.
        """
        self._append({"unit": unit, "notes": notes, "digests": digests or {}, "schemes": schemes or {}})
        self.finished[unit] = notes
        self.digests |= digests or {}
        self.schemes |= schemes or {}

    @contextmanager
    def as_published(self, config: dict[str, Any]) -> Iterator[Path]:
        """Make a directory of links that looks like the future OUT; OUT.partial has no config.json to be loaded by."""
        with tempfile.TemporaryDirectory(prefix="afpq-") as place:
            directory = Path(place) / self.out.name
            directory.mkdir()
            for path in self.path.iterdir():
                # A run killed at its end leaves a config.
                if path.is_file() and path.name not in ("config.json", JOURNAL, LOCK):
                    (directory / path.name).symlink_to(path)
            write_json(directory / "config.json", config)
            try:
                yield directory
            except AfpqError as error:
                raise AfpqError(self.public(str(error), directory)) from error.__cause__

    def public(self, text: str, directory: Path) -> str:
        """Return a text for the user with OUT in the place of the temporary directory of `as_published`."""
        return text.replace(str(directory), str(self.out))

    def publish(self) -> None:
        """Drop the scratch files, give the directory its real name once all is on the disk, and drop the journal."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in self.path.iterdir():
            _sync(path)
        _sync(self.path)
        refuse_existing(self.out)
        os.replace(self.path, self.out)
        with suppress(OSError):  # the result is there in any case
            (self.out / JOURNAL).unlink()
            _sync(self.out.parent)
        self.lock.release(self.out)

    def discard(self) -> None:
        """Remove the directory; the lock file goes last, so that no run begins in it meanwhile."""
        with suppress(OSError):
            self._clear()
        self.lock.release(self.path)
        with suppress(OSError):
            self.path.rmdir()

    def leave(self, keep: bool) -> None:
        """End without a result; `keep` the directory for a later run, or remove it."""
        if keep:
            self.lock.release(self.path)
        else:
            self.discard()

    def _begin(self, fingerprint: dict[str, Any], resume: bool) -> None:
        refuse_existing(self.out)  # checked with the lock held: the run that held it before may have made OUT
        kept = self._read_journal() if resume else None
        if kept is None:
            self._start(fingerprint)
        else:
            self._continue(kept, fingerprint)

    def _start(self, fingerprint: dict[str, Any]) -> None:
        if not (self.path / JOURNAL).exists() and any(path.name != LOCK for path in self.path.iterdir()):
            raise AfpqError(f"{self.path}: is in the way, and was not made by afpq; move it or choose another place")
        self._clear()
        try:
            self.scratch.mkdir()
            self._append({"fingerprint": fingerprint})
        except OSError:
            self._clear()
            raise

    def _clear(self) -> None:
        """Remove everything except the lock; the journal last, so that the directory is recognized until then."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == JOURNAL):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _continue(self, lines: list[dict[str, Any]], fingerprint: dict[str, Any]) -> None:
        changed = differences(lines[0]["fingerprint"], fingerprint)
        if changed:
            raise AfpqError(
                f"{self.path}: begun with another {' and another '.join(changed)}; "
                "repeat the command it was begun with, or add --no-resume to start again"
            )
        self.scratch.mkdir(exist_ok=True)
        self.finished = {line["unit"]: line["notes"] for line in lines[1:]}
        self.digests = {name: value for line in lines[1:] for name, value in line.get("digests", {}).items()}
        self.schemes = {module: text for line in lines[1:] for module, text in line.get("schemes", {}).items()}

    def _append(self, value: dict[str, Any]) -> None:
        with open(self.path / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self) -> list[dict[str, Any]] | None:
        """Read the journal, cut back to its whole lines; None if there is nothing to resume."""
        journal = self.path / JOURNAL
        if not journal.exists():
            return None
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(journal, "r+b") as file:
                file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError:
            return None
        return lines if len(lines) > 1 and "fingerprint" in lines[0] else None


@contextmanager
def work_directory(out: Path, needed_bytes: int, fingerprint: dict[str, Any], resume: bool) -> Iterator[WorkDirectory]:
    """Work in OUT.partial; it is renamed at the end, and kept for a later run if this one stops after a finished unit.

    Bad input (AfpqError) discards it, except with `WorkDirectory.keep`. Raises AfpqError if OUT exists already or
    appears meanwhile, if OUT.partial was begun with other settings, is in use by another run or cannot be written, and
    if the disk is too small for `needed_bytes`.
    """
    refuse_existing(out)
    out = Path(os.path.realpath(out) if out.is_symlink() else os.path.abspath(out))
    try:
        work = WorkDirectory(out, fingerprint, resume)
    except (OSError, ValueError) as error:
        raise _cannot_write(out, error) from None
    try:
        free = shutil.disk_usage(work.path).free
        if not work.finished and free < needed_bytes:
            raise AfpqError(f"{out}: needs {needed_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free")
        yield work
        work.publish()
    except AfpqError:
        work.leave(work.keep)
        raise
    except OSError as error:
        work.leave(bool(work.finished))
        raise _cannot_write(out, error) from None
    except BaseException:
        work.leave(bool(work.finished))
        raise


def refuse_existing(out: Path) -> None:
    """Raise AfpqError if `out` exists, except as an empty directory; a link stands for what it leads to."""
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AfpqError(f"{out}: exists already; remove it or choose another place")
        target = Path(os.path.realpath(out))
        if out.is_symlink() and (target.is_symlink() or not target.parent.is_dir()):
            # A disk that is not mounted, or a link to itself: directories made there would fill another disk.
            raise AfpqError(f"{out}: is a symbolic link to {target}, where no directory can be; choose another place")
        if os.path.ismount(out):
            raise AfpqError(f"{out}: is the root of a file system, which cannot be replaced; give a directory in it")
    except (OSError, ValueError) as error:
        raise _cannot_write(out, error) from None


def _cannot_write(out: Path, error: OSError | ValueError) -> AfpqError:
    """Make the error for a failed write, with the file's name if the system gives it."""
    place = getattr(error, "filename2", None) or getattr(error, "filename", None) or out
    return AfpqError(f"{place}: cannot write: {getattr(error, 'strerror', None) or error}")


def _sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems without it for directories
            raise
    finally:
        os.close(file)
