# SPDX-License-Identifier: MIT
"""The directory a run works in: OUT.partial, renamed to OUT when all is done, with a journal to go on from.

The journal holds a fingerprint of everything that decides the result, then a line for each finished unit. A unit's
line is written after its tensors are on the disk, so whatever moment a run is killed at, the journal is right; a torn
last line is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from afpq.checkpoint import write_json
from afpq.errors import AfpqError

JOURNAL = "afpq_journal.jsonl"
SCRATCH = "scratch"


class WorkDirectory:
    """OUT.partial while it is worked in; `finished` maps units done to what was noted of them.

    `digests` holds a checksum of every tensor written. `keep` tells whether an AfpqError leaves the directory for a
    later run: not while bad input may be the reason, unless it was there before.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.partial")
        self.finished: dict[str, list[dict[str, Any]]] = {}
        self.digests: dict[str, str] = {}
        kept = self._read_journal() if resume and self.path.exists() else None
        if kept is None:
            self._start(fingerprint)
        else:
            self._continue(kept, fingerprint)
        self.keep = bool(self.finished)

    @property
    def scratch(self) -> Path:
        """For files that are not part of the result."""
        return self.path / SCRATCH

    def finish(self, unit: str, notes: list[dict[str, Any]], digests: dict[str, str] | None = None) -> None:
        """Record a unit whose tensors are on the disk, with their checksums by name."""
        self._append({"unit": unit, "notes": notes, "digests": digests or {}})
        self.finished[unit] = notes
        self.digests |= digests or {}

    @contextmanager
    def as_published(self, config: dict[str, Any]) -> Iterator[Path]:
        """A directory of links that looks as OUT will, while OUT.partial has no config.json and cannot be loaded."""
        with tempfile.TemporaryDirectory(prefix="afpq-") as place:
            directory = Path(place) / self.out.name
            directory.mkdir()
            for path in self.path.iterdir():
                if path.is_file() and path.name not in ("config.json", JOURNAL):  # a run killed at its end left one
                    (directory / path.name).symlink_to(path)
            write_json(directory / "config.json", config)
            yield directory

    def publish(self) -> None:
        """Drop the scratch files and the journal, and give the directory its real name."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        (self.path / JOURNAL).unlink()
        os.replace(self.path, self.out)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _start(self, fingerprint: dict[str, Any]) -> None:
        if self.path.exists():
            if not (self.path / JOURNAL).exists() and any(self.path.iterdir()):
                raise AfpqError(
                    f"{self.path}: is in the way, and was not made by afpq; move it or choose another place"
                )
            shutil.rmtree(self.path)
        self.scratch.mkdir(parents=True)
        self._append({"fingerprint": fingerprint})

    def _continue(self, lines: list[dict[str, Any]], fingerprint: dict[str, Any]) -> None:
        old = lines[0]["fingerprint"]
        changed = [key for key in fingerprint if old.get(key) != fingerprint[key]]
        if changed:
            raise AfpqError(
                f"{self.path}: begun with another {' and another '.join(changed)}; "
                "repeat the command it was begun with, or add --no-resume to start again"
            )
        self.scratch.mkdir(exist_ok=True)
        self.finished = {line["unit"]: line["notes"] for line in lines[1:]}
        self.digests = {name: value for line in lines[1:] for name, value in line.get("digests", {}).items()}

    def _append(self, value: dict[str, Any]) -> None:
        with open(self.path / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self) -> list[dict[str, Any]] | None:
        """Its whole lines, cut back to them; None where there is nothing to go on from."""
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
    """Work in OUT.partial. It is renamed at the end, and kept for a later run if it is stopped after a finished unit.

    Bad input (AfpqError) discards it, unless it is to be kept (`WorkDirectory.keep`). Raises AfpqError where OUT
    exists already, was begun otherwise, or cannot be written, and where the disk is too small for `needed_bytes`.
    """
    out = Path(os.path.abspath(out))
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AfpqError(f"{out}: exists already; remove it or choose another place")
        work = WorkDirectory(out, fingerprint, resume)
    except (OSError, ValueError) as error:
        raise AfpqError(f"{out}: cannot write: {getattr(error, 'strerror', None) or error}") from None
    try:
        free = shutil.disk_usage(work.path).free
        if not work.finished and free < needed_bytes:
            raise AfpqError(f"{out}: needs {needed_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free")
        yield work
        work.publish()
    except AfpqError:
        if not work.keep:
            work.discard()
        raise
    except OSError as error:
        _keep_or_discard(work)
        raise AfpqError(f"{out}: cannot write: {error.strerror or error}") from None
    except BaseException:
        _keep_or_discard(work)
        raise


def _keep_or_discard(work: WorkDirectory) -> None:
    if not work.finished:
        work.discard()
