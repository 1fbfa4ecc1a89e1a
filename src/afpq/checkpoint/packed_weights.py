# SPDX-License-Identifier: MIT
"""Read a finished checkpoint as operands of `afpq.kernels`, for engines that have models of their own.

    checkpoint = open_packed("model-nf4")
    for name, layer in checkpoint.layers.items():
        weight = checkpoint.weight(name)  # or checkpoint.rows(name, a, b) for a column-parallel shard
        y = afpq.kernels.linear(x, *weight.arguments(bias))

No model is loaded: headers are read at first, and each tensor when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from afpq.checkpoint.quantized_layers import QuantizedLayer, quantized_layers
from afpq.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from afpq.errors import AfpqError
from afpq.kernels.operands import Packed, zeros_of_rows
from afpq.numerics.scale_storage import check_scales_finite

ROWS_FIRST = ("qweight", "scales", "scales_pos", "scales_neg")  # parts whose first dimension is the weight's rows


@dataclass(frozen=True)
class PackedCheckpoint:
    """A checkpoint whose weights are read as they are saved.

    Attributes:
        layers: by the module's name: scheme, shape [out, in] and the names of its tensors.
        plain: headers of all other tensors (norms, biases, what was kept), by the names in the files.
    """

    checkpoint: Checkpoint
    layers: dict[str, QuantizedLayer]
    plain: dict[str, TensorInfo]

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json."""
        return self.checkpoint.config

    def tensor(self, name: str) -> Tensor:
        """Read a tensor that is not of a quantized layer. Raises AfpqError naming it if it does not exist or fails."""
        if name not in self.plain:
            raise AfpqError(f"{self.checkpoint.directory}: no tensor {name} outside of quantized layers")
        return self.checkpoint.read(name)

    def weight(self, name: str) -> Packed:
        """Read the operands of a quantized layer, on the CPU.

        Raises AfpqError if there is no such layer, and naming the tensor if it cannot be read or holds NaN or Inf.
        """
        return self.rows(name, 0, self._layer(name).shape[0])

    def rows(self, name: str, first: int, last: int) -> Packed:
        """Read the operands of rows [first, last) of a quantized layer: outputs first .. last of its linear.

        Of tensors with a row for each output only these rows are read. Zero points are packed along the rows: they are
        read whole, and packed anew. Raises as `weight`, and AfpqError for rows that the layer does not have.
        """
        layer = self._layer(name)
        if not 0 <= first < last <= layer.shape[0]:
            raise AfpqError(f"{name}: rows [{first}, {last}) of {layer.shape[0]}")
        tensors = {}
        for part, tensor in layer.tensors.items():
            if part in ROWS_FIRST:
                tensors[part] = self._slice(tensor, first, last)
            else:
                tensors[part] = self.checkpoint.read(tensor)
            check_scales_finite({part: tensors[part]}, tensor.removesuffix(part))
        if "zeros" in tensors:
            bits = layer.scheme.format.bits
            tensors["zeros"] = zeros_of_rows(tensors["zeros"], bits, layer.shape[0], first, last).contiguous()
        weight = Packed.from_tensors(tensors, layer.scheme)
        weight.check(layer.shape[1])
        return weight

    def _layer(self, name: str) -> QuantizedLayer:
        if name not in self.layers:
            raise AfpqError(f"{self.checkpoint.directory}: no quantized layer {name}")
        return self.layers[name]

    def _slice(self, name: str, first: int, last: int) -> Tensor:
        """Read rows [first, last) of a tensor, in memory of their own."""
        info = self.checkpoint.tensors[name]
        try:
            with safe_open(info.file, "pt") as file:
                rows: Tensor = file.get_slice(name)[first:last]
                return rows.clone()
        except (OSError, SafetensorError) as error:
            raise AfpqError(f"{info.file}: cannot read tensor {name}: {error}") from None


def open_packed(directory: str | Path, trust_remote_code: bool = False) -> PackedCheckpoint:
    """Open a quantized checkpoint, a directory or the id of a repository on the hub; reads headers only.

    Raises AfpqError for one that is not quantized by afpq or is incomplete, naming the file or the tensor.
    """
    checkpoint = open_checkpoint(directory)
    layers = {layer.name: layer for layer in quantized_layers(checkpoint, trust_remote_code)}
    packed = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    plain = {name: info for name, info in checkpoint.tensors.items() if name not in packed}
    return PackedCheckpoint(checkpoint, layers, plain)
