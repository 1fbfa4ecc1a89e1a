# SPDX-License-Identifier: MIT
"""Write a stream of tensors as sharded safetensors, in place.

`Plan.outputs` gives all names, dtypes and shapes beforehand, so every shard's header is written first and each tensor
goes straight to its place in the file: no shard is ever held in memory, and a writer can resume where another was
killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from torch import Tensor

from afpq.checkpoint.atomic_files import write_json
from afpq.checkpoint.reader import DTYPES, INDEX, WEIGHTS
from afpq.checkpoint.verify import _bytes
from afpq.errors import AfpqError
from afpq.numerics.packing import Spec, spec_bytes

MAX_SHARD = 5_000_000_000  # bytes, for years the default of Transformers; a larger tensor gets its own shard
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int
    spec: Spec


class ShardWriter:
    """A writer of named tensors, in any order, into safetensors files laid out beforehand.

    Use as a context manager; leaving it without an error checks that every tensor was written, syncs the files and
    writes the index. `write` raises AfpqError for a tensor that differs from its announcement.
    """

    def __init__(
        self, directory: Path, outputs: dict[str, Spec], max_shard: int = MAX_SHARD, written: Iterable[str] = ()
    ) -> None:
        """Lay the files out; `written` names tensors that an earlier writer of the same outputs left in its files."""
        self.directory, self.outputs = directory, outputs
        written = set(written)
        shards = _split(outputs, max_shard)
        count = len(shards)
        self.names = (
            [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self.files: list[BinaryIO] = []
        self.places: dict[str, _Place] = {}
        self.missing = set(outputs) - written
        try:
            for index, members in enumerate(shards):
                self._lay_out(index, members, "r+b" if written else "wb")
        except BaseException:
            self._close()
            raise

    def _lay_out(self, index: int, members: dict[str, Spec], mode: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin, ends = 0, {}
        for name, (dtype, shape) in members.items():
            ends[name] = end = begin + spec_bytes((dtype, shape))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format requires aligned data
        file: BinaryIO = open(self.directory / self.names[index], mode)  # type: ignore[assignment]  # noqa: SIM115  (closed in __exit__)
        self.files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
        for name, spec in members.items():
            self.places[name] = _Place(index, 8 + len(text) + ends[name] - spec_bytes(spec), spec)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place."""
        place = self.places[name]
        if (tensor.dtype, tuple(tensor.shape)) != place.spec:
            given = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AfpqError(f"tensor {name}: planned {place.spec[0]} {place.spec[1]}, made {given}; this is a bug")
        file = self.files[place.shard]
        file.seek(place.offset)
        file.write(_bytes(tensor))
        self.missing.discard(name)

    def sync(self) -> None:
        """Flush to disk: what was written survives a crash of this process or machine."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.sync()
                self._finish()
        finally:
            self._close()

    def _close(self) -> None:
        for file in self.files:
            with suppress(OSError):  # buffered bytes cannot be written either; the first error counts
                file.close()

    def _finish(self) -> None:
        if self.missing:
            raise AfpqError(
                f"tensor {min(self.missing)} was never written ({len(self.missing)} missing); this is a bug"
            )
        if len(self.names) > 1:
            total = sum(spec_bytes(spec) for spec in self.outputs.values())
            weight_map = {name: self.names[place.shard] for name, place in self.places.items()}
            write_json(self.directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(outputs: dict[str, Spec], max_shard: int) -> list[dict[str, Spec]]:
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in outputs.items():
        if shards[-1] and size + spec_bytes(spec) > max_shard:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec_bytes(spec)
    return shards
