# SPDX-License-Identifier: MIT
"""Where the command line prints what: results, notes and progress; `--quiet`, `--verbose` and `--json`.

Results go to standard output, notes too unless `--quiet` is given; progress, warnings and errors go to standard error.
`--json -` keeps standard output for the JSON: all other text then goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, TextIO

from rich.console import Console

from afpq.checkpoint.atomic_files import write_json
from afpq.errors import AfpqError
from afpq.progress import Progress

STANDARD_OUTPUT = Path("-")  # of `--json`
SECONDS_BETWEEN = 10.0  # lines of progress if there is no terminal
MOST_THREADS = 1024

# Names and texts are printed as they are: no markup, no emoji codes, no breaks at the terminal's width.
results = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # what was asked for
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # notes
errors = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


class _Choice:
    """What the options of one command line chose."""

    def __init__(self) -> None:
        self.verbose = self.quiet = False
        self.json_to: TextIO | None = None


_choice = _Choice()


def reset_output() -> None:
    """Undo what the options of a command line chose."""
    if _choice.json_to is not None:
        sys.stdout = _choice.json_to
    vars(_choice).update(vars(_Choice()))
    console.quiet = results.quiet = False


def choose_output(verbose: bool, quiet: bool) -> None:
    """Print more, or less, from now on. Raises AfpqError for both."""
    _choice.verbose |= verbose
    _choice.quiet |= quiet
    if _choice.verbose and _choice.quiet:
        raise AfpqError("--verbose and --quiet: give one of them")
    console.quiet = _choice.quiet


def note(text: str) -> None:
    """Print what the user should know before the work begins, unless `--quiet` was given."""
    if not _choice.quiet:
        errors.print(f"note: {text}")


def warn(text: str) -> None:
    """Print a warning, unless `--quiet` was given."""
    if not _choice.quiet:
        errors.print(f"warning: {text}", style="bold yellow")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, Transformers, which this imports, shows no progress bars and no warnings."""
    from afpq.evaluation.loading import quiet_transformers as quiet

    with quiet():
        yield


def use_threads(count: int | None) -> None:
    """Compute on so many threads of the CPU; None: torch's choice. Raises AfpqError for a number out of range."""
    if count is None:
        return
    if not 1 <= count <= MOST_THREADS:
        raise AfpqError(f"--threads {count}: give a number from 1 to {MOST_THREADS}")
    import torch

    torch.set_num_threads(count)


# ---- JSON


def check_json_place(path: Path | None) -> None:
    """Raises AfpqError, before any work, if `--json` could not be written after it.

    For `-`, everything but the JSON goes to standard error from now on.
    """
    if path is None:
        return
    if path == STANDARD_OUTPUT:
        _choice.json_to, sys.stdout = sys.stdout, sys.stderr
        results.quiet = _choice.quiet  # the JSON is the result
        return
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AfpqError(f"{path}: cannot write the JSON there; give a file in an existing directory, or - to print it")


def save_json(path: Path | None, value: Any) -> None:
    """Write the result of a command. Raises AfpqError if the file cannot be written, OSError for standard output."""
    if path is None:
        return
    if _choice.json_to is not None:
        print(json.dumps(value, indent=2, ensure_ascii=False), file=_choice.json_to, flush=True)
        return
    try:
        write_json(path, value)
    except OSError as error:
        raise AfpqError(f"{path}: cannot write: {error.strerror or error}") from None


# ---- progress


def duration_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress_bar(first: str, bar: bool = True) -> Iterator[Progress]:
    """Show a bar with the time left on standard error; if that is no terminal, a line every ten seconds.

    `first` is the work before the first report of progress. Without `bar` only the lines. With `--verbose` every report
    is a line; with `--quiet` nothing is shown.
    """
    if _choice.quiet:
        yield lambda name, done, total: None
    elif errors.is_terminal:
        with _bar(first, bar) as advance:
            yield advance
    else:
        with _lines(first) as advance:
            yield advance


@contextmanager
def _bar(first: str, shown: bool) -> Iterator[Progress]:
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Bar(*columns, console=errors, transient=True, disable=not shown) as bar:
        task, units = bar.add_task(first, total=None), _Units()

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)
            units.report(name, done, total)

        yield advance


@contextmanager
def _lines(first: str) -> Iterator[Progress]:
    """A thread prints where the work is, also while a long step reports nothing."""
    state, ended, stream = _State(first), Event(), errors.file

    def print_lines() -> None:
        while not ended.wait(SECONDS_BETWEEN):
            print(state.line(), file=stream, flush=True)

    thread, units = Thread(target=print_lines, daemon=True), _Units()
    thread.start()

    def advance(name: str, done: int, total: int) -> None:
        state.update(name, done, total)
        units.report(name, done, total)

    try:
        yield advance
    finally:
        ended.set()
        thread.join()


class _Units:
    """The lines of `--verbose`: one for each report that is new."""

    def __init__(self) -> None:
        self.last: tuple[str, int] | None = None

    def report(self, name: str, done: int, total: int) -> None:
        if _choice.verbose and (name, done) != self.last:
            self.last = name, done
            errors.print(f"{_percent(done, total):>5} {name}")


class _State:
    """What is being done, how far it is, and since when."""

    def __init__(self, name: str) -> None:
        self.start = time.monotonic()
        self.lock = Lock()
        self.name, self.done, self.total = name, 0, 0
        self.base: tuple[float, int] | None = None  # when the first amount of this kind was reported, and which

    def update(self, name: str, done: int, total: int) -> None:
        with self.lock:
            if self.base is None or total != self.total or done < self.done:
                self.base = time.monotonic(), done
            self.name, self.done, self.total = name, done, total

    def line(self) -> str:
        with self.lock:
            now = time.monotonic()
            text = f"{self.name}: {duration_text(now - self.start)}"
            if self.base is None or self.total <= 0:
                return text
            text += f", {_percent(self.done, self.total)}"
            begun, before = self.base
            if before < self.done < self.total:
                left = (now - begun) * (self.total - self.done) / (self.done - before)
                text += f", about {duration_text(left)} left"
            return text


def _percent(done: int, total: int) -> str:
    return f"{100 * done // max(total, 1)} %"
