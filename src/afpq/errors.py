# SPDX-License-Identifier: MIT
"""The one exception a user is expected to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Words of torch's and CUDA's errors that have no class of their own.
FULL = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class AfpqError(Exception):
    """Bad input, named, with what to do about it; the command line prints it as one line and exits with 2."""

    def __init__(self, message: str) -> None:
        """Cut a message of more than 2000 characters in its middle: names in files may be of any length."""
        super().__init__(message if len(message) <= 2000 else f"{message[:1200]} ... {message[-700:]}")


def counted(count: int, noun: str) -> str:
    """Return "1 tensor", "3 tensors": a number with its noun, whose plural has an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def in_all(count: int, noun: str) -> str:
    """Return " (3 tensors in all)", to stand behind the name of one of them; nothing if it is the only one."""
    return "" if count == 1 else f" ({counted(count, noun)} in all)"


def one_line(error: Exception, most: int = 200) -> str:
    """Return the first `most` characters of an error's message, on one line; empty if it has none."""
    return " ".join(str(error).split())[:most]


def out_of_memory(error: Exception) -> AfpqError | None:
    """The error to raise if `error` is a lack of memory, on a GPU or a CPU; None for any other error.

    torch raises a subclass of RuntimeError for a GPU and a plain RuntimeError for a CPU. An AfpqError has its words
    already.
    """
    import torch

    named = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    if not (named or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    reason = one_line(error) or "no details"
    return AfpqError(f"out of memory ({reason}): use a smaller --seq-len, fewer --samples or another --device")


@contextmanager
def named_lack_of_memory() -> Iterator[None]:
    """Inside, or in a function decorated with it, a lack of memory is the AfpqError of `out_of_memory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = out_of_memory(error)
        if full is None:
            raise
        raise full from None
