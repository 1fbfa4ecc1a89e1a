# SPDX-License-Identifier: MIT
"""The one exception a user is expected to see."""

from __future__ import annotations


class AfpqError(Exception):
    """Bad input, named, with what to do about it. The command line prints it as one line and exits with 2."""
