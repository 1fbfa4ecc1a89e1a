# SPDX-License-Identifier: MIT
"""Checksums of tensors and checkpoints, and the check that files hold what was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from afpq.checkpoint.atomic_files import digest_value
from afpq.checkpoint.reader import Checkpoint
from afpq.errors import AfpqError
from afpq.numerics.packing import Spec


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of a checkpoint's path, files (name, size, time) and config."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    place = checkpoint.directory if checkpoint.published is None else checkpoint.published.place
    return digest_value([str(place.resolve()), stats, checkpoint.config])


def digest(tensor: Tensor) -> str:
    """Return a checksum of a tensor's bytes, 32 hexadecimal digits; NaN and -0 count by their bits."""
    return hashlib.blake2b(_bytes(tensor), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_tensors(written: Checkpoint, outputs: Mapping[str, Spec], digests: Mapping[str, str]) -> None:
    """Check that the files hold every tensor as planned and computed. Raises AfpqError naming the first at fault."""
    unknown = next((name for name in written.tensors if name not in outputs), None)
    if unknown is not None:
        raise AfpqError(f"self-test: tensor {unknown} was written but not planned; this is a bug")
    for name, (dtype, shape) in outputs.items():
        info = written.tensors.get(name)
        if info is None or (info.dtype, info.shape) != (dtype, shape):
            found = "is missing" if info is None else f"is {info.dtype} {info.shape}"
            raise AfpqError(f"self-test: tensor {name} {found} in the files; {dtype} {shape} was planned")
        if digest(written.read(name)) != digests.get(name):
            raise AfpqError(
                f"self-test: tensor {name} is not in the files as it was computed: a faulty disk or memory, or files "
                "that were changed; repeat the command with --no-resume"
            )
