# SPDX-License-Identifier: MIT
"""Read a Hugging Face checkpoint lazily: headers first, then one tensor at a time. safetensors only."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afpq.checkpoint.encoded import EncodedTensor, Publication
from afpq.checkpoint.gguf_source import gguf_directory, gguf_file_of
from afpq.checkpoint.gguf_tensors import gguf_tensors
from afpq.checkpoint.low_precision import float_view, without_quantization
from afpq.checkpoint.unaware_loaders import GUARD_KEY, is_guard
from afpq.errors import AfpqError
from afpq.model.tensor_part import TensorPart

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("bin", "pt", "pth", "ckpt", "pkl", "pickle")  # never opened
CARD = "README.md"  # read for its licence, never copied: the output has a card of its own
# Copied next to the weights: every small file except the weights, their index and the config.
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "USE_POLICY*")
# safetensors dtype -> torch dtype, for all tensors that a checkpoint may hold
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what a weight may be stored in


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype and shape, from the header of its file; of an `encoded` one those it is decoded to."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    encoded: EncodedTensor | None = None

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.elements

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file; `bytes` are those in memory."""
        return self.bytes if self.encoded is None else self.encoded.stored_bytes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A directory with config.json and safetensors; `tensors` in the order of the files.

    A model `published` in a low precision is seen as floats: config and tensors are the decoded model's."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    published: Publication | None = None

    def read(self, name: str) -> Tensor:
        """Read one tensor into its own memory: no file stays mapped. Raises AfpqError if the file cannot be read."""
        return read_tensor(self.tensors[name], name)

    def read_part(self, part: TensorPart) -> Tensor:
        """Read a tensor of the model into its own memory; for a part at most its expert. Raises as `read`."""
        if part.expert is None:
            return part.of(self.read(part.tensor)).contiguous()
        info = self.tensors[part.tensor]
        if info.encoded is not None:
            return replace(part, expert=None).of(info.encoded.read_expert(part.expert)).clone().contiguous()
        try:
            with safe_open(info.file, "pt") as file:
                expert = file.get_slice(part.tensor)[part.expert]
        except (OSError, SafetensorError) as error:
            raise AfpqError(f"{info.file}: cannot read tensor {part.tensor}: {error}") from None
        return replace(part, expert=None).of(expert).clone().contiguous()

    def read_rows(self, part: TensorPart, rows: Sequence[int]) -> Tensor:
        """Read rows of a matrix, [len(rows), in]; only those if it is a whole tensor. Raises as `read`."""
        if part != TensorPart(part.tensor):
            return self.read_part(part)[list(rows)]
        info = self.tensors[part.tensor]
        if info.encoded is not None:
            return info.encoded.read_rows(rows)
        try:
            with safe_open(info.file, "pt") as file:
                matrix = file.get_slice(part.tensor)
                return torch.cat([matrix[row : row + 1] for row in rows])
        except (OSError, SafetensorError) as error:
            raise AfpqError(f"{info.file}: cannot read tensor {part.tensor}: {error}") from None

    def companions(self) -> Iterator[Path]:
        """Yield the files to copy next to new weights: tokenizer, generation config, chat template, licence."""
        patterns = (*COMPANIONS, "*.py") if "auto_map" in self.config else COMPANIONS
        found = {path for pattern in patterns for path in self.directory.glob(pattern) if path.is_file()}
        for path in sorted(found):
            left = path.name == "config.json" or path.name.startswith("adapter_")  # an adapter's are no part of it
            if not left and not path.name.endswith(".safetensors.index.json"):
                yield path


def read_tensor(info: TensorInfo, name: str) -> Tensor:
    """Read one tensor into its own memory. Raises AfpqError if the file cannot be read."""
    if info.encoded is not None:
        return info.encoded.read()
    try:
        with safe_open(info.file, "pt") as file:
            return file.get_tensor(name).clone()  # type: ignore[no-any-return]
    except (OSError, SafetensorError) as error:
        raise AfpqError(f"{info.file}: cannot read tensor {name}: {error}") from None


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a directory, or a repository on the hub by its id (downloaded to the cache).

    Reads headers only. Raises AfpqError, naming the file, for a missing or truncated shard, a missing config, an index
    that leads out of the directory, a tensor that two files hold, or weights that are not safetensors. Models published
    in fp8 or MXFP4, and GGUF files, are read as floats; scales that do not fit are an AfpqError too.
    """
    directory = _locate(model)
    config = read_json(directory / "config.json")
    gguf = gguf_file_of(directory)
    if gguf is not None:
        encoded, form = gguf_tensors(gguf, directory)
        return Checkpoint(directory, config, dict(map(_info, encoded.items())), Publication(form, gguf))
    # Transformers prefers a single file to an index; so do we, or two readers would see two models.
    if (directory / WEIGHTS).exists():
        files, weight_map = [directory / WEIGHTS], {}
    elif (directory / INDEX).exists():
        weight_map = _weight_map(directory / INDEX)
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        pickles = sorted(path.name for kind in PICKLES for path in directory.glob(f"*.{kind}"))
        hint = f" ({pickles[0][:80]} was not opened: a pickle can run code)" if pickles else ""
        raise AfpqError(f"{directory}: no {WEIGHTS} and no {INDEX}; only safetensors checkpoints can be read{hint}")
    other = config.get(GUARD_KEY)
    if other is not None and not is_guard(other) and other != (INDEX if weight_map else WEIGHTS):
        raise AfpqError(f"{directory / 'config.json'}: transformers_weights is {str(other)[:80]!r}; remove it")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        headers = tensor_headers(file)
        twice = next((name for name in headers if name in tensors), None)
        if twice is not None:
            raise AfpqError(f"{file}: tensor {twice} is in {tensors[twice].file.name} too; which one counts?")
        tensors |= headers
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise AfpqError(f"{directory / weight_map[missing]}: tensor {missing} is listed in {INDEX} but not there")
    return _as_floats(Checkpoint(directory, config, tensors))


def _as_floats(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, decoded if it is published in a low precision."""
    if (view := float_view(checkpoint.directory, checkpoint.config, checkpoint.tensors)) is None:
        return checkpoint
    tensors = dict(
        _info(view.encoded[name]) if name in view.encoded else (name, info)
        for name, info in checkpoint.tensors.items()
        if name not in view.hidden
    )
    published = Publication(view.form, checkpoint.directory) if view.encoded else None
    return replace(checkpoint, config=without_quantization(checkpoint.config), tensors=tensors, published=published)


def _info(named: tuple[str, EncodedTensor]) -> tuple[str, TensorInfo]:
    name, tensor = named
    return name, TensorInfo(tensor.dtype, tensor.shape, tensor.file, tensor)


def _weight_map(index: Path) -> dict[str, str]:
    """Read tensor -> name of its file, which lies next to the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AfpqError(f"{index}: no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str):
            raise AfpqError(f"{index}: its weight_map must give the name of a file for each tensor")
        if not name.endswith(".safetensors") or name != PurePath(name).name or "\0" in name:
            raise AfpqError(f"{index}: {name[:200]!r} is not the name of a safetensors file beside it")
    return weight_map


def _locate(model: str | Path) -> Path:
    directory = Path(model)
    try:
        unpacked = gguf_directory(directory)
        if unpacked is not None:
            return unpacked
        if directory.is_dir():
            return directory
        if directory.exists():
            raise AfpqError(f"{model}: is a file; give the directory that holds config.json")
    except (OSError, ValueError) as error:  # a name no file can have
        raise AfpqError(f"{str(model)[:80]!r}: no such directory: {error}"[:200]) from None
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise AfpqError(f"{model}: no such directory")
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.py", CARD, *COMPANIONS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AfpqError(f"{model}: no such directory, and not to be had from the hub: {reason}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises AfpqError if it is missing or is something else."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise AfpqError(f"{path}: is no file")
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise AfpqError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise AfpqError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AfpqError(f"{path}: expected a JSON object")
    return value


def tensor_headers(file: Path) -> dict[str, TensorInfo]:
    """Read the header of one safetensors file. Raises AfpqError if the file is missing or not whole."""
    tensors = {}
    try:
        if not file.is_file():
            raise AfpqError(f"{file}: missing shard" if not file.exists() else f"{file}: is no file")
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                piece = opened.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise AfpqError(f"{file}: tensor {name} has dtype {piece.get_dtype()}, which is not supported")
                tensors[name] = TensorInfo(dtype, tuple(piece.get_shape()), file)
    except (OSError, SafetensorError) as error:
        raise AfpqError(f"{file}: not a whole safetensors file: {error}") from None
    return tensors
