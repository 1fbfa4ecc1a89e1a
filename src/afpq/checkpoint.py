# SPDX-License-Identifier: MIT
"""Write a stream of tensors as a Hugging Face directory that appears only when it is complete.

All names, dtypes and shapes are known beforehand (`Plan.outputs`), so every shard's header is written first and each
tensor goes straight to its place in the file: no shard is ever held in memory. Work happens in OUT.partial, which
has no config.json until the end and is renamed last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.packing import Spec, spec_bytes
from afpq.source import DTYPES, INDEX, WEIGHTS

MAX_SHARD = 5_000_000_000  # bytes, as Transformers used for years; a larger tensor gets a shard of its own
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int
    spec: Spec


class ShardWriter:
    """Writes named tensors, in any order, into safetensors files laid out beforehand.

    Use as a context manager; leaving it without an error checks that every tensor was written, syncs the files and
    writes the index. `write` raises AfpqError for a tensor that differs from its announcement.
    """

    def __init__(self, directory: Path, outputs: dict[str, Spec], max_shard: int = MAX_SHARD) -> None:
        self.directory, self.outputs = directory, outputs
        shards = _split(outputs, max_shard)
        count = len(shards)
        self.names = (
            [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self.files: list[BinaryIO] = []
        self.places: dict[str, _Place] = {}
        self.missing = set(outputs)
        for index, members in enumerate(shards):
            self._lay_out(index, members)

    def _lay_out(self, index: int, members: dict[str, Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin, ends = 0, {}
        for name, (dtype, shape) in members.items():
            ends[name] = end = begin + spec_bytes((dtype, shape))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned
        file = open(self.directory / self.names[index], "wb")  # noqa: SIM115  (closed in __exit__)
        self.files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
        for name, spec in members.items():
            self.places[name] = _Place(index, 8 + len(text) + ends[name] - spec_bytes(spec), spec)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its place."""
        place = self.places[name]
        if (tensor.dtype, tuple(tensor.shape)) != place.spec:
            given = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise AfpqError(f"tensor {name}: planned {place.spec[0]} {place.spec[1]}, made {given}; this is a bug")
        file = self.files[place.shard]
        file.seek(place.offset)
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.missing.discard(name)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self.files:
            if error is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if error is None:
            self._finish()

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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def atomic_directory(out: Path, expected_bytes: int) -> Iterator[Path]:
    """Yields OUT.partial to fill; renames it to OUT at the end, or removes it if anything goes wrong.

    Raises AfpqError where OUT exists already, where the disk is too small for `expected_bytes`, and for any
    failure to write.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AfpqError(f"{out}: exists already; remove it or choose another place")
    partial = out.with_name(f"{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < expected_bytes:
            raise AfpqError(f"{out}: needs {expected_bytes / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free")
        yield partial
        os.replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AfpqError(f"{out}: cannot write: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
