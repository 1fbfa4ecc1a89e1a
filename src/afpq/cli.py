# SPDX-License-Identifier: MIT
"""The command line: run a command of `commands/`.

Wrong input: one line, exit code 2. A signal: 128 and its number, 130 after Control-C, 143 after SIGTERM. Signals are
handled before anything is imported that takes time, so that Ctrl-C gives one line at any time.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


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
    try:
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
            signal.signal(signal.SIGINT, stop)
        _run()
    except KeyboardInterrupt:
        _stopped(stop.called)
    except Exception as error:
        if stop.called is not None or type(error).__name__ == "Abort":  # Click's, whichever copy of it Typer brings
            _stopped(stop.called)
        _explain(error)


def _run() -> None:
    from afpq.commands.application import app
    from afpq.commands.output import reset_output

    try:
        if app(standalone_mode=False) == 130:  # Typer's result of an interrupted command
            raise KeyboardInterrupt
    finally:
        reset_output()


def _explain(error: Exception) -> NoReturn:
    from afpq.errors import AfpqError

    if isinstance(error, AfpqError):
        _fail(str(error))
    if isinstance(error, OSError):  # the output itself: a full disk, a closed pipe
        _fail(f"{error.filename2 or error.filename or 'cannot write the output'}: {error.strerror or error}")
    if not hasattr(error, "format_message"):  # Click's own errors have it
        raise error
    _fail(error.format_message() or "see afpq --help")


def _stopped(number: int | None) -> NoReturn:
    print("afpq: stopped; the same command goes on from the last finished block", file=sys.stderr)
    sys.exit(128 + (number or signal.SIGINT))


def _fail(message: str) -> NoReturn:
    # Names from files are foreign: none may move the cursor or be no text at all.
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print(f"afpq: {plain}", file=sys.stderr)
    sys.exit(2)
