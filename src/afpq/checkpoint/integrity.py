# SPDX-License-Identifier: MIT
"""Compare a directory with the checksums of what was written there; one tensor is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afpq.checkpoint.checksums import CHECKSUMS, Checksums, config_digests, read_checksums, spec_text
from afpq.checkpoint.reader import INDEX, WEIGHTS, Checkpoint, open_checkpoint, read_json
from afpq.checkpoint.verify import digest
from afpq.errors import AfpqError

Progress = Callable[[str, int, int], None]  # (tensor just read, bytes done, bytes in all)


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was written: the tensor or the key of the config, its file, and what is wrong."""

    name: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name} {self.reason}"


@dataclass(frozen=True)
class Verification:
    """The differences found, none for a directory as it was written, among this many tensors of the checksums."""

    tensors: int
    bytes: int
    differences: tuple[Difference, ...]

    @property
    def intact(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        found = [asdict(difference) for difference in self.differences]
        return {"intact": self.intact, "tensors": self.tensors, "bytes": self.bytes, "differences": found}


def verify(model: str | Path, progress: Progress | None = None) -> Verification:
    """Read every tensor of `model` (a directory or hub id) and compare it, and the config, with the checksums.

    Raises AfpqError for a directory without checksums, and for one that cannot be read as a checkpoint at all, such
    as one with a truncated file.
    """
    checkpoint = open_checkpoint(model)
    written = read_checksums(checkpoint.directory)
    total = sum(info.bytes for info in checkpoint.tensors.values())
    differences = [*_config_differences(checkpoint, written), *_names(checkpoint, written)]
    done, changed = 0, 0
    for name, info in checkpoint.tensors.items():
        if name not in written.tensors:
            continue
        reason = _reason(checkpoint, name, written)
        if reason is not None:
            changed += 1
            differences.append(Difference(f"tensor {name}", info.file.name, reason))
        done += info.bytes
        if progress is not None:
            progress(name, done, total)
    if changed and changed == len(written.tensors.keys() & checkpoint.tensors.keys()):
        place = Difference("the directory", checkpoint.directory.name, "has no tensor as written: of another model")
        differences.insert(0, place)
    return Verification(len(written.tensors), total, tuple(differences))


def _reason(checkpoint: Checkpoint, name: str, written: Checksums) -> str | None:
    """What is wrong with a tensor that is there; a header is compared before any byte is read."""
    info = checkpoint.tensors[name]
    found = spec_text((info.dtype, info.shape))
    if found != written.specs[name]:
        return f"is {found}, was written as {written.specs[name]}"
    try:
        same = digest(checkpoint.read(name)) == written.tensors[name]
    except AfpqError as error:
        return f"cannot be read: {error}"
    return None if same else "is not as it was written"


def _names(checkpoint: Checkpoint, written: Checksums) -> Iterator[Difference]:
    """Tensors that are missing, that were never written, or that the index looks for in another file."""
    single = (checkpoint.directory / WEIGHTS).exists()
    index = {} if single else read_json(checkpoint.directory / INDEX)["weight_map"]
    for name in written.tensors:
        if name not in checkpoint.tensors:
            yield Difference(f"tensor {name}", index.get(name, CHECKSUMS), "was written, and is missing")
    for name, info in checkpoint.tensors.items():
        if name not in written.tensors:
            yield Difference(f"tensor {name}", info.file.name, "is there, and was not written")
        elif not single and index.get(name) != info.file.name:
            yield Difference(f"tensor {name}", info.file.name, f"is in this file, and {INDEX} says {index.get(name)}")


def _config_differences(checkpoint: Checkpoint, written: Checksums) -> Iterator[Difference]:
    """Keys of quantization_config that decide values and are not as they were."""
    found = config_digests(checkpoint.config)
    for key in dict.fromkeys((*written.config, *found)):
        if found.get(key) != written.config.get(key):
            gone = "is missing" if key not in found else "was added" if key not in written.config else "was changed"
            yield Difference(f"quantization_config.{key}", "config.json", gone)
