# SPDX-License-Identifier: MIT
"""Summarize a checkpoint: true bits per weight, coverage, sizes. Reads headers only."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afpq.checkpoint.quantized_layers import layers_and_rest
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.coverage import kinds_left
from afpq.numerics.formats import repeated_codebook_bytes
from afpq.numerics.size import Size

_BOOK = re.compile(r"^lut:.*(?=-a?sym-g)")


@dataclass(frozen=True)
class LayerInfo:
    """One quantized linear, or embedding."""

    name: str
    scheme: str
    shape: tuple[int, int]
    bits_per_weight: float

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelInfo:
    """Figures of a checkpoint.

    `bits_per_weight` is over the blocks' quantized weights with their scales and zero points, or over all tensors of a
    model that is not quantized; `file_bits_per_weight` over everything stored. `coverage` is the quantized share of the
    blocks' weights, `left` the others: tensor's name with numbers as `*` -> number of weights. `ends` are the quantized
    head and embedding (a tied pair once, as the embedding); `layers` has them too.
    """

    bits_per_weight: float
    coverage: float
    left: dict[str, int]
    quantized_parameters: int
    total_parameters: int
    file_bytes: int
    layers: list[LayerInfo]
    quantization_config: dict[str, Any] | None
    file_bits_per_weight: float = 0.0
    ends: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def schemes(self) -> list[str]:
        """Return the schemes of the blocks, sorted; for many codebooks their number instead of all values."""
        kinds: dict[str, list[str]] = {}
        for scheme in {layer.scheme for layer in self.layers if layer.name not in self.ends}:
            kinds.setdefault(_BOOK.sub("lut", scheme), []).append(scheme)
        return sorted(f"{kind} ({len(s)} code books)" if len(s) > 1 else s[0] for kind, s in kinds.items())


def model_info(model: str | Path, trust_remote_code: bool = False) -> ModelInfo:
    """Summarize a directory or hub id. Raises AfpqError for one that is broken or quantized by another tool."""
    checkpoint = open_checkpoint(model)
    files = {info.file for info in checkpoint.tensors.values()}
    file_bytes = sum(file.stat().st_size for file in files)
    keys = checkpoint.config.get("quantization_config")
    found, in_block = layers_and_rest(checkpoint, trust_remote_code) if keys else ([], _in_block)
    parts = {name: checkpoint.tensors[name].bytes for layer in found for name in layer.tensors.values()}
    ends = tuple(layer.name for layer in found if layer.end)
    inside = [layer for layer in found if not layer.end] or found
    quantized = sum(layer.elements for layer in found)
    plain = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    total = quantized + sum(info.elements for info in plain.values())
    formats = [layer.scheme.format for layer in found]
    books = sum(format.codebook_bytes for format in formats) - repeated_codebook_bytes(formats)
    every = Size(sum(parts.values()) + sum(info.bytes for info in plain.values()) + books, total)
    again = repeated_codebook_bytes(layer.scheme.format for layer in inside)
    blocks = sum((layer.size for layer in inside), Size(-again, 0))
    covered = sum(layer.elements for layer in found if not layer.end)
    left = {n: i.elements for n, i in plain.items() if len(i.shape) > 1 and in_block(n)}
    return ModelInfo(
        bits_per_weight=blocks.bits if found else every.bits,
        coverage=covered / (covered + sum(left.values())) if covered else 0.0,
        left=kinds_left(left),
        quantized_parameters=quantized,
        total_parameters=total,
        file_bytes=file_bytes,
        layers=[LayerInfo(each.name, str(each.scheme), each.shape, each.size.bits) for each in found],
        quantization_config=keys,
        file_bits_per_weight=every.bits,
        ends=ends,
    )


def _in_block(name: str) -> bool:
    """Whether a tensor's name contains an index, as those of repeated blocks do: for a model that is not built."""
    return any(part.isdigit() for part in name.split("."))
