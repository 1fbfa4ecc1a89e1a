# SPDX-License-Identifier: MIT
"""The command line: run a command of `commands/`.

Wrong input: one line, exit code 2. A signal: 128 and its number, 130 after Control-C, 143 after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from afpq.commands import compare, evaluate, inspect, quantize, verify_files
from afpq.commands import export_import as exchange
from afpq.commands.console import errors
from afpq.commands.options import app
from afpq.errors import AfpqError

COMMANDS = (quantize, inspect, evaluate, compare, exchange, verify_files)  # importing them registers their commands


class _Stop:
    """A handler of SIGINT and SIGTERM that notes the signal, since libraries may replace the exception by their own."""

    called: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.called = number
        raise KeyboardInterrupt


def main() -> None:
    """Run `afpq`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, stop)
    try:
        if app(standalone_mode=False) == 130:  # Typer's result of an interrupted command
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _stopped(stop.called)
    except Exception as error:
        if stop.called is not None:
            _stopped(stop.called)
        if isinstance(error, AfpqError):
            _fail(str(error))
        if isinstance(error, OSError):  # the output itself: a full disk, a closed pipe
            _fail(f"{error.filename2 or error.filename or 'cannot write the output'}: {error.strerror or error}")
        # Click's own errors, whichever copy of Click Typer brings
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message() or "see afpq --help")


def _stopped(number: int | None) -> NoReturn:
    errors.print("afpq: stopped; the same command goes on from the last finished block")
    sys.exit(128 + (number or signal.SIGINT))


def _fail(message: str) -> NoReturn:
    # Names from files are foreign: none may move the cursor or be no text at all.
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    errors.print(f"afpq: {plain}")
    sys.exit(2)
