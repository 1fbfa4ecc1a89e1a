# SPDX-License-Identifier: MIT
"""The one exception a user is expected to see."""

from __future__ import annotations


class AfpqError(Exception):
    """Bad input, named, with what to do about it. The command line prints it as one line and exits with 2."""

    def __init__(self, message: str) -> None:
        """Names in files may be of any length; a message is not."""
        super().__init__(message if len(message) <= 2000 else f"{message[:1200]} ... {message[-700:]}")
