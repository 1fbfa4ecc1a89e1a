# SPDX-License-Identifier: MIT
"""The tensors of a GGUF file under the names that Transformers has for them, decoded and reordered as it does.

Transformers' own table of names and its rearrangements (`modeling_gguf_pytorch_utils`) are used on one tensor, or one
expert of it, at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from afpq.checkpoint.gguf_source import PLAIN, gguf_errors, open_reader
from afpq.errors import AfpqError
from afpq.model.skeleton import model_class

UNREAD = "rope_freqs.weight"  # factors of rotary positions, which Transformers takes from a config


@dataclass(frozen=True)
class GgufPiece:
    """A tensor of the file: `shape` in the order of torch, its type, and where its bytes are."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufConversion:
    """How a file's tensors become the model's: Transformers' processor of the architecture, and its table of names."""

    file: Path
    processor: Any
    names: dict[str, str]

    def model_name(self, name: str) -> str | None:
        """The model's name of a tensor, which several of experts may share."""
        if name in self.names:
            return self.names[name]
        pattern = getattr(self.processor, "GGUF_MOE_WEIGHTS_PATTERN", None)
        match = None if pattern is None else pattern.fullmatch(name)
        return None if match is None else self.names.get(match.groupdict().get("name"))

    def convert(self, pieces: Sequence[GgufPiece], expert: int | None = None) -> Tensor:
        """The model's tensor in float32, of all its pieces; with `expert`, of one index of their first dimension."""
        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        result = None
        for piece in pieces:
            result = self.processor.process(
                weights=self._decoded(piece, expert),
                name=piece.name,
                tensor_key_mapping=self.names,
                parsed_parameters=parsed,
            )
        assert result is not None
        stored = list(parsed["tensors"].values())
        return stored[0] if stored else torch.from_numpy(np.array(result.weights))

    def _decoded(self, piece: GgufPiece, expert: int | None) -> Any:
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        size, offset, shape = piece.bytes, piece.offset, piece.shape
        if expert is not None:
            size //= shape[0]
            offset, shape = offset + expert * size, (1, *shape[1:])
        data = np.fromfile(self.file, np.uint8, size, offset=offset)
        if len(data) != size:
            raise AfpqError(f"{self.file}: tensor {piece.name} ends before its last byte")
        return dequantize(data.reshape(quant_shape_to_byte_shape(shape, piece.kind)), piece.kind)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the model in a GGUF file; satisfies EncodedTensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[GgufPiece, ...]
    conversion: GgufConversion

    @property
    def file(self) -> Path:
        return self.conversion.file

    @property
    def stored_bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    def read(self) -> Tensor:
        with gguf_errors(self.file):
            return self._checked(self.conversion.convert(self.pieces), self.shape)

    def read_expert(self, index: int) -> Tensor:
        if any(len(piece.shape) != len(self.shape) for piece in self.pieces):
            return self.read()[index]
        with gguf_errors(self.file):
            return self._checked(self.conversion.convert(self.pieces, index), (1, *self.shape[1:]))[0]

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        return self.read()[list(rows)]

    def _checked(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise AfpqError(f"{self.file}: {self.name} is {tuple(tensor.shape)} in it; the config says {shape}")
        return tensor.to(self.dtype).contiguous()


@lru_cache
def gguf_tensors(file: Path, directory: Path) -> tuple[dict[str, GgufTensor], str]:
    """(model's name -> tensor, the file's form in words); `directory` is what `gguf_directory` made of it.

    Raises AfpqError for a type that cannot be decoded, an architecture that Transformers does not read, and a tensor
    that it has no name for.
    """
    reader, config = open_reader(file), AutoConfig.from_pretrained(directory)
    with gguf_errors(file):
        conversion, shapes = _conversion(file, reader.get_field("general.architecture").contents(), config)
        for kind in {tensor.tensor_type for tensor in reader.tensors}:
            _check_decodable(file, kind)
        pieces: dict[str, list[GgufPiece]] = {}
        for each in reader.tensors:
            shape = tuple(int(size) for size in reversed(each.shape))
            name = conversion.model_name(each.name)
            if name in shapes:
                piece = GgufPiece(each.name, each.tensor_type, shape, int(each.data_offset), int(each.n_bytes))
                pieces.setdefault(name, []).append(piece)
            elif each.name != UNREAD:
                raise AfpqError(f"{file}: Transformers has no name for its tensor {each.name}")
        tensors = {}
        for name, members in pieces.items():
            if sum(math.prod(piece.shape) for piece in members) != math.prod(shapes[name]):
                found = " and ".join(str(piece.shape) for piece in members)
                raise AfpqError(f"{file}: tensor {members[0].name} is {found}; the config says {shapes[name]}")
            tensors[name] = GgufTensor(name, _dtype(members, config.dtype), shapes[name], tuple(members), conversion)
    return tensors, _form(reader)


def _conversion(file: Path, architecture: str, config: Any) -> tuple[GgufConversion, dict[str, tuple[int, ...]]]:
    """What converts a file's tensors, and the shapes of the model's."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=load_gguf_checkpoint(file)["config"])
    with torch.device("meta"):
        model = model_class(config)._from_config(config)
    names = get_gguf_hf_weights_map(model, processor)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return GgufConversion(file, processor, names), shapes


def _check_decodable(file: Path, kind: Any) -> None:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        raise AfpqError(f"{file}: it has tensors in {kind.name}, which the gguf package cannot decode") from None


def _dtype(pieces: Sequence[GgufPiece], usual: torch.dtype) -> torch.dtype:
    """A plain float's own; the config's for blocks of integers, and for pieces of several types."""
    kinds = {piece.kind.name for piece in pieces}
    named = PLAIN.get(kinds.pop()) if len(kinds) == 1 else None
    return usual if named is None else getattr(torch, named)


def _form(reader: Any) -> str:
    """The types in the file, and what of it Transformers leaves unread."""
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    unread = [tensor.name for tensor in reader.tensors if tensor.name == UNREAD]
    unread += sorted(key for key in reader.fields if ".rope.scaling." in key)
    note = f"; Transformers does not read its {', '.join(unread)}" if unread else ""
    return f"GGUF with tensors in {', '.join(types)}{note}"
