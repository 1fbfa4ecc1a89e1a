# SPDX-License-Identifier: MIT
"""Tensors of models that are published in a low precision: stored in one form, presented as the floats they stand for.

A decoded tensor has the dtype that the model's config names, and bfloat16 where it names none: what Transformers and
the publishers' own scripts convert such a model to. Its values are computed in float32 and rounded once to that dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afpq.errors import AfpqError

_NAMED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class InFile(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path: ...


class Header(InFile, Protocol):
    """What a file's header states of a tensor."""

    @property
    def bytes(self) -> int: ...


class EncodedTensor(InFile, Protocol):
    """A tensor that is decoded as it is read; dtype and shape are those of the decoded tensor.

    The methods return tensors in memory of their own and raise AfpqError, naming the tensor, for a file that cannot be
    read and for scales that are NaN or Inf.
    """

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, with scales."""

    def read(self) -> Tensor:
        """The whole tensor."""

    def read_expert(self, index: int) -> Tensor:
        """One index of the first dimension; no more than that is decoded."""

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, [len(rows), in]."""


@dataclass(frozen=True)
class Publication:
    """The form a model is published in, in words, and the directory or file that the user named."""

    form: str
    place: Path


@dataclass(frozen=True)
class FloatView:
    """What takes the place of the tensors in a checkpoint's headers: encoded ones by name, and names that vanish.

    `encoded` maps the name in the file to (name in the view, tensor); `hidden` are scales.
    """

    form: str
    encoded: Mapping[str, tuple[str, EncodedTensor]]
    hidden: frozenset[str]


def decoded_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The float dtype that a config names, also one of its text model; bfloat16 where there is none."""
    text = config.get("text_config")
    for keys in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            found = _NAMED.get(str(keys.get(key)).removeprefix("torch."))
            if found is not None:
                return found
    return torch.bfloat16


def read_stored(file: Path, name: str, index: int | None = None) -> Tensor:
    """A tensor as it is stored, or one index of its first dimension. Raises AfpqError where it cannot be read."""
    with _opened(file, name) as opened:
        tensor: Tensor = opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
        return tensor.clone()


def read_stored_rows(file: Path, name: str, rows: Sequence[int]) -> Tensor:
    """Some rows of a matrix as it is stored, [len(rows), in]. Raises AfpqError where they cannot be read."""
    with _opened(file, name) as opened:
        matrix = opened.get_slice(name)
        return torch.stack([matrix[row] for row in rows])


@contextmanager
def _opened(file: Path, name: str) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise AfpqError(f"{file}: cannot read tensor {name}: {error}") from None
