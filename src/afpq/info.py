# SPDX-License-Identifier: MIT
"""What a checkpoint holds: true bits per weight, coverage, sizes. Reads headers only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from afpq.blocks import find_blocks
from afpq.config import QUANT_METHOD, config_from_json, is_kept
from afpq.coverage import kinds_left
from afpq.errors import AfpqError
from afpq.names import Located
from afpq.packing import layout
from afpq.skeleton import build_skeleton
from afpq.source import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class LayerInfo:
    """One quantized linear."""

    name: str
    scheme: str
    shape: tuple[int, int]
    bits_per_weight: float


@dataclass(frozen=True)
class ModelInfo:
    """Figures of a checkpoint. `bits_per_weight` is over the quantized weights with their scales and zero points,
    or over all tensors of a model that is not quantized; `coverage` is the quantized share of the blocks' weights,
    `left` the others by tensor: its name, with numbers as `*` -> how many weights."""

    bits_per_weight: float
    coverage: float
    left: dict[str, int]
    quantized_parameters: int
    total_parameters: int
    file_bytes: int
    layers: list[LayerInfo]
    quantization_config: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def model_info(model: str | Path, trust_remote_code: bool = False) -> ModelInfo:
    """Of a directory or hub id. Raises AfpqError for a checkpoint that is broken or quantized by another tool."""
    checkpoint = open_checkpoint(model)
    files = {info.file for info in checkpoint.tensors.values()}
    file_bytes = sum(file.stat().st_size for file in files)
    keys = checkpoint.config.get("quantization_config")
    layers, parts = _quantized_layers(checkpoint, keys, trust_remote_code) if keys else ([], {})
    quantized = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    plain = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    total = quantized + sum(info.elements for info in plain.values())
    counted = parts if layers else {name: info.bytes for name, info in plain.items()}
    left = {n: i.elements for n, i in plain.items() if len(i.shape) > 1 and _in_block(n)}
    return ModelInfo(
        bits_per_weight=8 * sum(counted.values()) / (quantized or total),
        coverage=quantized / (quantized + sum(left.values())) if quantized else 0.0,
        left=kinds_left(left),
        quantized_parameters=quantized,
        total_parameters=total,
        file_bytes=file_bytes,
        layers=layers,
        quantization_config=keys,
    )


def _in_block(name: str) -> bool:
    """Whether a tensor's name has an index in it, as those of repeated blocks do."""
    return any(part.isdigit() for part in name.split("."))


def _quantized_layers(
    checkpoint: Checkpoint, keys: dict[str, Any], trust_remote_code: bool
) -> tuple[list[LayerInfo], dict[str, int]]:
    """(the quantized linears, bytes of each of their tensors)."""
    if isinstance(keys, dict) and keys.get("quant_method") != QUANT_METHOD:
        raise AfpqError(f"{checkpoint.directory}: quantized by {keys.get('quant_method')!r}, not by {QUANT_METHOD}")
    recipe, kept = config_from_json(keys)
    model = build_skeleton(checkpoint.directory, trust_remote_code)
    names = {name for block in find_blocks(model) for name, _ in block.linears()}
    located = Located(checkpoint.tensors, model)
    layers: list[LayerInfo] = []
    parts: dict[str, int] = {}
    for name, module in model.named_modules():
        scheme = recipe.scheme_for(name)
        if not isinstance(module, nn.Linear) or scheme is None or is_kept(name, kept) or name not in names:
            continue
        shape = (module.out_features, module.in_features)
        sizes: dict[str, int] = {}
        for part, (dtype, part_shape) in layout(scheme, *shape).items():
            key = located.require(f"{name}.{part}", dtype, part_shape)
            sizes[key] = checkpoint.tensors[key].bytes
        layers.append(LayerInfo(name, str(scheme), shape, 8 * sum(sizes.values()) / (shape[0] * shape[1])))
        parts |= sizes
    return layers, parts
