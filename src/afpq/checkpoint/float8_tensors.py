# SPDX-License-Identifier: MIT
"""float8 weights with scales next to them, as DeepSeek, llm-compressor and fbgemm publish them.

`X.weight` float8 has `X.weight_scale_inv` or `X.weight_scale` (a parameter `P` of experts: `P_scale_inv`, `P_scale`),
and both multiply: one for the tensor, one for each output, or one for each block. Scales of activations are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afpq.checkpoint.encoded import FloatView, Header, read_stored, read_stored_rows
from afpq.errors import AfpqError
from afpq.numerics.float8_decoding import decode_float8

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu)
SCALES = ("_scale_inv", "_scale")
FUSED_ACTIVATION_SCALES = ("_input_scale", "_activation_scale")  # after the name of a parameter of experts
ACTIVATION_SCALES = (
    "input_scale", "activation_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale", "v_scale",
)  # fmt: skip

Block = tuple[int, int]


@dataclass(frozen=True)
class Float8Tensor:
    """A float8 tensor [..., out, in] and its scales; satisfies EncodedTensor.

    `block` has the weights of one scale along each dimension.
    """

    name: str
    scale_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    scale_file: Path
    block: tuple[int, ...]
    stored_bytes: int

    def read(self) -> Tensor:
        weight, scales = read_stored(self.file, self.name), self._scales()
        if weight.ndim == 2:
            return decode_float8(weight, scales, self._matrix_block).to(self.dtype)
        decoded = torch.empty(self.shape, dtype=self.dtype)
        for index, expert in enumerate(weight):
            decoded[index] = decode_float8(expert, self._of_expert(scales, index), self._matrix_block)
        return decoded

    def read_expert(self, index: int) -> Tensor:
        weight, scales = read_stored(self.file, self.name, index), self._of_expert(self._scales(), index)
        return decode_float8(weight, scales, self._matrix_block).to(self.dtype)

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        weight = read_stored_rows(self.file, self.name, rows)
        scales = self._scales()[[row // self.block[0] for row in rows]]
        return decode_float8(weight, scales, (1, self.block[1])).to(self.dtype)

    @property
    def _matrix_block(self) -> Block:
        return self.block[-2], self.block[-1]

    def _of_expert(self, scales: Tensor, index: int) -> Tensor:
        return scales[index // self.block[0]]

    def _scales(self) -> Tensor:
        """float32, with as many dimensions as the tensor."""
        scales = read_stored(self.scale_file, self.scale_name).float()
        if not torch.isfinite(scales).all():
            raise AfpqError(f"{self.scale_file}: tensor {self.scale_name} has NaN or Inf in it; download it again")
        return scales.reshape(_grid(self.shape, self.block))


def float8_view(method: str, headers: Mapping[str, Header], blocks: Sequence[Block], dtype: torch.dtype) -> FloatView:
    """The decoded view of a checkpoint's float8 tensors; `blocks` are the shapes of blocks that its config names.

    Raises AfpqError, naming the tensor, for a scale that is missing, has another shape or dtype, or has no weight.
    """
    encoded: dict[str, tuple[str, Float8Tensor]] = {}
    for name, header in headers.items():
        if header.dtype in FLOAT8 and len(header.shape) in (2, 3):
            encoded[name] = (name, _described(name, header, headers, blocks, dtype))
    scales = {tensor.scale_name for _, tensor in encoded.values()}
    for name in headers:
        if name.endswith(("weight_scale_inv", "weight_scale")) and name not in scales:
            weight = name.rpartition("_scale")[0]
            found = f"is {headers[weight].dtype}" if weight in headers else "is missing"
            raise AfpqError(f"{headers[name].file}: tensor {name} is a float8 weight's scale, but {weight} {found}")
    dropped = {name for name, header in headers.items() if _of_activations(name, header)}
    kinds = sorted({_kind(tensor) for _, tensor in encoded.values()})
    form = f"{method}, float8 with a scale for each {' or '.join(kinds)}"
    return FloatView(form, encoded, frozenset(scales | dropped))


def _described(
    name: str, header: Header, headers: Mapping[str, Header], blocks: Sequence[Block], dtype: torch.dtype
) -> Float8Tensor:
    scale_name = next((name + ending for ending in SCALES if name + ending in headers), None)
    if scale_name is None:
        raise AfpqError(f"{header.file}: tensor {name} is {header.dtype}, and its scale {name}{SCALES[0]} is missing")
    scale = headers[scale_name]
    block = block_of(header.shape, scale.shape, blocks)
    if block is None or scale.dtype not in SCALE_DTYPES:
        expected = f"one, {header.shape[-2]} (one for each output)"
        expected += "".join(f" or {_grid(header.shape, (*_ones(header.shape), *block))}" for block in blocks)
        raise AfpqError(
            f"{scale.file}: tensor {scale_name} is {scale.dtype} {scale.shape}; {name} {header.shape} needs "
            f"float scales: {expected}"
        )
    return Float8Tensor(
        name, scale_name, dtype, header.shape, header.file, scale.file, block, header.bytes + scale.bytes
    )


def block_of(shape: tuple[int, ...], scale: tuple[int, ...], blocks: Sequence[Block]) -> tuple[int, ...] | None:
    """Weights of one scale along each dimension of a tensor of 2 or 3; None where the scales' shape fits nothing."""
    for block in blocks:
        full = (*_ones(shape), *block)
        if scale == _grid(shape, full):
            return full
    if math.prod(scale) == 1:
        return tuple(max(size, 1) for size in shape)
    if len(scale) == 1:  # one for each output of a matrix, or for each expert
        scale = (*scale, *(1 for _ in shape[1:]))
    if len(scale) != len(shape) or any(count not in (1, size) for count, size in zip(scale, shape)):
        return None
    return tuple(1 if count == size else max(size, 1) for count, size in zip(scale, shape))


def _ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (len(shape) - 2)


def _grid(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many scales there are along each dimension."""
    return tuple(-(-size // length) for size, length in zip(shape, block))


def _of_activations(name: str, header: Header) -> bool:
    """Whether a tensor is a scale of activations or of a cache, which play no part in the weights."""
    leaf = name.rpartition(".")[2]
    return (leaf in ACTIVATION_SCALES or leaf.endswith(FUSED_ACTIVATION_SCALES)) and math.prod(header.shape) == 1


def _kind(tensor: Float8Tensor) -> str:
    rows, columns = tensor.block[-2:]
    if (rows, columns) == tensor.shape[-2:]:
        return "tensor" if len(tensor.shape) == 2 or tensor.block[0] > 1 else "expert"
    channels = {(1, tensor.shape[-1]), (tensor.shape[-2], 1)}
    return "channel" if (rows, columns) in channels else f"block of {rows}x{columns}"
