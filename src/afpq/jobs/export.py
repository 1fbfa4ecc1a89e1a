# SPDX-License-Identifier: MIT
"""`afpq.export`: turn a quantized checkpoint into an ordinary one, for software that cannot read ours.

One tensor is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq.checkpoint.companions import refuse_adapter
from afpq.checkpoint.quantized_layers import QuantizedLayer, quantized_layers
from afpq.checkpoint.reader import FLOATS, Checkpoint, open_checkpoint
from afpq.checkpoint.unaware_loaders import unguarded
from afpq.errors import AfpqError
from afpq.evaluation.tables import size_text
from afpq.jobs.conversion_card import Provenance, provenance_card, scheme_text
from afpq.jobs.rewrite import Rewrite, rewrite
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import Spec, from_tensors, spec_bytes
from afpq.progress import Progress

EXPORT_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
}  # fmt: skip
SLAB_WEIGHTS = 2**24  # unpacked at a time: decoding takes some 14 bytes per weight


@dataclass(frozen=True)
class Exported:
    """Figures of an export; `kept` names the tensors that stayed in a wider dtype than the rest."""

    dtype: str
    layers: int
    weights: int
    input_bytes: int
    output_bytes: int
    kept: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    model: str | Path,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the quantized checkpoint `model` (a directory or hub id) into the new directory `out` with plain weights.

    `dtype` is bf16, fp16, fp32 or the torch dtype; by default that of the tensors that are not quantized. Those are
    cast too, except the ones in a wider dtype than the rest (a router's float32 bias in a bfloat16 model): they are
    wide on purpose. `out` appears when complete. Raises AfpqError for a checkpoint that is not afpq's or is broken, and
    for a tensor too large for `dtype`.
    """
    checkpoint = open_checkpoint(model)
    refuse_adapter(checkpoint.directory)
    layers = quantized_layers(checkpoint, trust_remote_code)
    packed = {name: layer for layer in layers for name in layer.tensors.values()}
    plain = [name for name in checkpoint.tensors if name not in packed]
    stray = next((name for name in plain if name.endswith(".qweight")), None)
    if stray is not None:
        raise AfpqError(f"{checkpoint.directory}: {stray} is packed, but the config says that its layer is not")
    fused = next((layer.name for layer in layers if layer.split), None)
    if fused is not None:
        raise AfpqError(
            f"{fused}: this model's files hold all experts of a layer in one tensor, which export cannot write; load "
            "it and save model.dequantize()"
        )
    usual = _usual_dtype(checkpoint, plain)
    target = usual if dtype is None else _parse_dtype(dtype)
    outputs: dict[str, Spec] = {}
    for name, info in checkpoint.tensors.items():
        layer = packed.get(name)
        if layer is None:
            outputs[name] = (_dtype_after(info.dtype, usual, target), info.shape)
        elif name == layer.tensors["qweight"]:
            outputs[original_name(layer)] = (target, layer.shape[::-1] if layer.transposed else layer.shape)
    floats = [name for name in plain if checkpoint.tensors[name].dtype in FLOATS]
    kept = tuple(name for name in floats if outputs[name][0] != target)
    result = Exported(
        _text(target),
        len(layers),
        sum(layer.elements for layer in layers),
        sum(info.bytes for info in checkpoint.tensors.values()),
        sum(map(spec_bytes, outputs.values())),
        kept,
    )
    config = _plain_config(unguarded(checkpoint.config), _text(target))
    job = Rewrite(checkpoint, outputs, config, _card(str(model), checkpoint, result))
    rewrite(job, Path(out), _tensors(checkpoint, packed, outputs), progress)
    return result


def original_name(layer: QuantizedLayer) -> str:
    """Return the name of a quantized layer's weight [out, in] before quantization and after an export."""
    return layer.tensors["qweight"].removesuffix("qweight") + "weight"


def dequantized(checkpoint: Checkpoint, layer: QuantizedLayer, dtype: torch.dtype) -> Tensor:
    """Decode a layer's weight, [out, in]. Raises AfpqError for broken tensors or a weight too large for `dtype`."""
    tensors = {part: checkpoint.read(name) for part, name in layer.tensors.items()}
    weight = from_tensors(tensors, layer.scheme, layer.shape[1])
    codes, count = layer.tensors["qweight"], len(layer.scheme.format.values)
    if layer.elements and int(weight.codes.max()) >= count:
        raise AfpqError(f"tensor {codes}: holds a code beyond the {count} of {layer.scheme.format}; the file is broken")
    if layer.elements and not _reach(weight) <= torch.finfo(torch.float32).max:
        raise AfpqError(f"layer {layer.name}: its scales are not finite numbers; the file is broken")
    result = torch.empty(layer.shape, dtype=dtype)
    step = max(1, SLAB_WEIGHTS // max(1, layer.shape[1]))
    for first in range(0, layer.shape[0], step):
        rows = slice(first, first + step)
        slab = QuantizedWeight(weight.codes[rows], weight.scales[rows], weight.scheme).dequantize()
        result[rows] = _cast(original_name(layer), slab, dtype)
    return result


def _reach(weight: QuantizedWeight) -> float:
    """Return an upper bound of the weights' size; NaN if a scale is NaN."""
    values = weight.scheme.format.values
    largest = torch.stack([side.float().abs().amax() for side in (weight.scales.pos, weight.scales.neg)]).amax()
    return float(largest) * (values[-1] - values[0])


def _tensors(
    checkpoint: Checkpoint, packed: dict[str, QuantizedLayer], outputs: dict[str, Spec]
) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.tensors:
        layer = packed.get(name)
        if layer is None:
            tensor, dtype = checkpoint.read(name), outputs[name][0]
            yield name, tensor if tensor.dtype == dtype else _cast(name, tensor, dtype)
        elif name == layer.tensors["qweight"]:
            original = original_name(layer)
            weight = dequantized(checkpoint, layer, outputs[original][0])
            yield original, weight.T.contiguous() if layer.transposed else weight


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor. Raises AfpqError for a finite number that overflows `dtype`."""
    result = tensor.to(dtype)
    if not tensor.numel() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return result
    extremes = torch.stack(tensor.aminmax()).to(dtype)  # one pass; a check of each number takes three
    if bool(torch.isfinite(extremes).all()):
        return result
    lost = torch.isfinite(tensor) & ~torch.isfinite(result)
    if bool(lost.any()):
        most = float(tensor[lost].abs().max())
        raise AfpqError(f"tensor {name}: {most:.4g} is too large for {_text(dtype)}; export to bf16 or fp32")
    return result


def _usual_dtype(checkpoint: Checkpoint, names: list[str]) -> torch.dtype:
    """Return the dtype of most numbers that are not quantized."""
    counts: Counter[torch.dtype] = Counter()
    for name in names:
        info = checkpoint.tensors[name]
        if info.dtype in FLOATS:
            counts[info.dtype] += info.elements
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def _dtype_after(found: torch.dtype, usual: torch.dtype, target: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor that is not quantized: the target, unless it is no float or wider than usual."""
    return found if found not in FLOATS or found.itemsize > usual.itemsize else target


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = EXPORT_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in EXPORT_DTYPES.values():
        raise AfpqError(f"cannot export to {dtype}; known: bf16, fp16, fp32")
    return found


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json without the quantization, and the new dtype wherever it names one."""
    named = "dtype" if "torch_dtype" not in config else "torch_dtype"
    plain = {key: value for key, value in config.items() if key != "quantization_config"} | {named: dtype}
    for key, value in plain.items():
        if key.endswith("_config") and isinstance(value, dict):
            plain[key] = _plain_config(value, dtype)
    return plain


def _card(model: str, checkpoint: Checkpoint, result: Exported) -> str:
    kept = f"{len(result.kept)} tensors stayed wider: {', '.join(f'`{name}`' for name in result.kept[:8])}"
    return provenance_card(
        Provenance(
            model,
            checkpoint,
            f"dequantized to {result.dtype}",
            f"with the weights of {{model}}, which afpq quantized ({scheme_text(checkpoint.config)}), written out as "
            f"ordinary {result.dtype} tensors. It loads anywhere, without afpq. What quantization lost is still lost: "
            "where the original model is at hand, take that.",
            (
                f"{result.layers} linear layers with {result.weights:,} weights were dequantized.",
                f"Size: {size_text(result.output_bytes)} (quantized: {size_text(result.input_bytes)}).",
                *([kept + (" and others." if len(result.kept) > 8 else ".")] if result.kept else []),
            ),
            ("afpq", "dequantized"),
        )
    )
