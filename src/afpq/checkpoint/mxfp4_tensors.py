# SPDX-License-Identifier: MIT
"""MXFP4 experts as gpt-oss publishes them: `P_blocks` and `P_scales` for a parameter `P` [experts, in, out].

The files hold outputs as rows; Transformers' module, and so the decoded view, holds them as columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from afpq.checkpoint.encoded import FloatView, Header, read_stored
from afpq.errors import AfpqError
from afpq.numerics.mxfp4_decoding import GROUP_BYTES, NO_NUMBER, decode_mxfp4

BLOCKS, SCALES = "_blocks", "_scales"


@dataclass(frozen=True)
class Mxfp4Tensor:
    """Experts' weights in MXFP4, decoded one expert at a time; satisfies EncodedTensor. `name` is the parameter's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    scale_file: Path
    stored_bytes: int

    def read(self) -> Tensor:
        decoded = torch.empty(self.shape, dtype=self.dtype)
        for index in range(self.shape[0]):
            decoded[index] = self.read_expert(index)
        return decoded

    def read_expert(self, index: int) -> Tensor:
        blocks = read_stored(self.file, self.name + BLOCKS, index)
        exponents = read_stored(self.scale_file, self.name + SCALES, index)
        if (exponents == NO_NUMBER).any():
            raise AfpqError(
                f"{self.scale_file}: tensor {self.name}{SCALES} has NaN (exponent {NO_NUMBER}) in it; download it again"
            )
        return decode_mxfp4(blocks, exponents).to(self.dtype).T.contiguous()

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        raise AfpqError(f"{self.file}: tensor {self.name} is no matrix; its experts are read one by one")


def mxfp4_view(headers: Mapping[str, Header], dtype: torch.dtype) -> FloatView:
    """The decoded view of a checkpoint's MXFP4 tensors.

    Raises AfpqError, naming the tensor, for blocks or scales that are missing or have another shape or dtype.
    """
    encoded: dict[str, tuple[str, Mxfp4Tensor]] = {}
    for stored, header in headers.items():
        if not stored.endswith(BLOCKS):
            continue
        name = stored.removesuffix(BLOCKS)
        if header.dtype != torch.uint8 or len(header.shape) != 4 or header.shape[3] != GROUP_BYTES:
            raise AfpqError(
                f"{header.file}: tensor {stored} is {header.dtype} {header.shape}; MXFP4 needs uint8 "
                f"[experts, rows, groups, {GROUP_BYTES}]"
            )
        scales = headers.get(name + SCALES)
        if scales is None:
            raise AfpqError(f"{header.file}: tensor {stored} is MXFP4, and its scales {name}{SCALES} are missing")
        if scales.dtype != torch.uint8 or scales.shape != header.shape[:3]:
            raise AfpqError(
                f"{scales.file}: tensor {name}{SCALES} is {scales.dtype} {scales.shape}; {stored} needs uint8 "
                f"{header.shape[:3]}"
            )
        if name in headers:
            raise AfpqError(f"{header.file}: tensor {stored} stands for {name}, which is there too")
        experts, rows, groups, _ = header.shape
        shape = (experts, 2 * GROUP_BYTES * groups, rows)
        tensor = Mxfp4Tensor(name, dtype, shape, header.file, scales.file, header.bytes + scales.bytes)
        encoded[stored] = (name, tensor)
    hidden = frozenset(f"{name}{SCALES}" for name, _ in encoded.values())
    orphan = next((n for n in headers if n.endswith(SCALES) and n not in hidden), None)
    if orphan is not None:
        raise AfpqError(f"{headers[orphan].file}: {orphan} has no {orphan.removesuffix(SCALES)}{BLOCKS} next to it")
    return FloatView("mxfp4, 4-bit floats with an exponent for each 32", encoded, hidden)
