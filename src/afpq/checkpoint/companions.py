# SPDX-License-Identifier: MIT
"""The files next to the weights: which are copied to a result, what they take, and an adapter among them, refused."""

from __future__ import annotations

from pathlib import Path

from afpq.checkpoint.reader import Checkpoint
from afpq.errors import AfpqError

ADAPTER = "adapter_config.json"


def refuse_adapter(directory: Path) -> None:
    """Raises AfpqError if an adapter lies in the directory: Transformers loads the model with it."""
    if (directory / ADAPTER).exists():
        raise AfpqError(
            f"{directory / ADAPTER}: an adapter lies beside the model, and Transformers loads the model with it; merge "
            f"it first (PEFT's merge_and_unload) and save the result, or remove {ADAPTER} and its weights"
        )


def companion_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of all files that are copied."""
    return sum(path.stat().st_size for path in checkpoint.companions())


def copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy them. Raises AfpqError naming one that cannot be read, and OSError naming a copy that cannot be written."""
    for path in checkpoint.companions():
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AfpqError(f"{path}: cannot read: {error.strerror or error}") from None
        copy = directory / path.name
        try:
            copy.write_bytes(content)
        except OSError as error:
            error.filename = str(copy)  # a full disk has none
            raise
