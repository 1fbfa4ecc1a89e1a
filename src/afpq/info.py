# SPDX-License-Identifier: MIT
"""What a checkpoint holds: true bits per weight, coverage, sizes. Reads headers only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afpq.blocks import find_blocks
from afpq.config import QUANT_METHOD, config_from_json, is_kept
from afpq.coverage import kinds_left
from afpq.ends import saved_ends
from afpq.errors import AfpqError
from afpq.names import Located
from afpq.packing import layout
from afpq.skeleton import build_skeleton
from afpq.source import Checkpoint, open_checkpoint


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
    """Figures of a checkpoint. `bits_per_weight` is over the blocks' quantized weights with their scales and zero
    points, or over all tensors of a model that is not quantized; `coverage` is the quantized share of the blocks'
    weights, `left` the others by tensor: its name, with numbers as `*` -> how many weights. `file_bits_per_weight` is
    over everything stored. `ends` are the head and the embedding where they are quantized (a tied pair once, as the
    embedding); `layers` has them too."""

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


def model_info(model: str | Path, trust_remote_code: bool = False) -> ModelInfo:
    """Of a directory or hub id. Raises AfpqError for a checkpoint that is broken or quantized by another tool."""
    checkpoint = open_checkpoint(model)
    files = {info.file for info in checkpoint.tensors.values()}
    file_bytes = sum(file.stat().st_size for file in files)
    keys = checkpoint.config.get("quantization_config")
    layers, ends, parts = _quantized_layers(checkpoint, keys, trust_remote_code) if keys else ([], (), {})
    inside = [layer for layer in layers if layer.name not in ends] or layers
    quantized = sum(layer.elements for layer in layers)
    in_layers = sum(layer.elements for layer in inside)
    plain = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
    total = quantized + sum(info.elements for info in plain.values())
    stored = sum(parts.values()) + sum(info.bytes for info in plain.values())
    bits = sum(layer.bits_per_weight * layer.elements for layer in inside) if layers else 8 * stored
    covered = sum(layer.elements for layer in layers if layer.name not in ends)
    left = {n: i.elements for n, i in plain.items() if len(i.shape) > 1 and _in_block(n)}
    return ModelInfo(
        bits_per_weight=bits / (in_layers or total),
        coverage=covered / (covered + sum(left.values())) if covered else 0.0,
        left=kinds_left(left),
        quantized_parameters=quantized,
        total_parameters=total,
        file_bytes=file_bytes,
        layers=layers,
        quantization_config=keys,
        file_bits_per_weight=8 * stored / total,
        ends=ends,
    )


def _in_block(name: str) -> bool:
    """Whether a tensor's name has an index in it, as those of repeated blocks do."""
    return any(part.isdigit() for part in name.split("."))


def _quantized_layers(
    checkpoint: Checkpoint, keys: dict[str, Any], trust_remote_code: bool
) -> tuple[list[LayerInfo], tuple[str, ...], dict[str, int]]:
    """(the quantized linears and ends, which of them are ends, bytes of each of their tensors)."""
    if isinstance(keys, dict) and keys.get("quant_method") != QUANT_METHOD:
        raise AfpqError(f"{checkpoint.directory}: quantized by {keys.get('quant_method')!r}, not by {QUANT_METHOD}")
    recipe, kept = config_from_json(keys)
    model = build_skeleton(checkpoint.directory, trust_remote_code)
    names = {name for block in find_blocks(model) for name, _ in block.linears()}
    located = Located(checkpoint.tensors, model)
    ends = saved_ends(model, lambda name: located.find(name) is not None)
    chosen = {name: scheme for name, scheme in ends.schemes(recipe).items() if not (ends.tied and name == ends.head)}
    layers: list[LayerInfo] = []
    parts: dict[str, int] = {}
    for name, module in model.named_modules():
        scheme = chosen[name] if name in chosen else recipe.scheme_for(name)
        if scheme is None or is_kept(name, kept) or (name not in names and name not in chosen):
            continue
        rows, columns = module.get_parameter("weight").shape
        shape = (rows, columns)
        sizes: dict[str, int] = {}
        for part, (dtype, part_shape) in layout(scheme, *shape).items():
            key = located.require(f"{name}.{part}", dtype, part_shape)
            sizes[key] = checkpoint.tensors[key].bytes
        layers.append(LayerInfo(name, str(scheme), shape, 8 * sum(sizes.values()) / (shape[0] * shape[1])))
        parts |= sizes
    return layers, tuple(chosen), parts
