# SPDX-License-Identifier: MIT
"""Checkpoints saved from a wrapper of the model, whose name stands in all names of tensors.

torch.compile, DistributedDataParallel, FSDP and PEFT keep the model in an attribute, and a state dict of theirs that
is saved as it is holds `_orig_mod.model.layers...`. The names are read without it if the model then has more of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from afpq.checkpoint.encoded import EncodedTensor, read_stored, read_stored_rows
from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.reader import Checkpoint, TensorInfo
from afpq.model.experts import find_experts

# At the beginning of all names; those of the second list stand inside of names too, where each block was wrapped.
OUTSIDE_ALL = ("module", "base_model.model", "_forward_module")
ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BEGINNING = re.compile(rf"^(?:(?:{'|'.join(map(re.escape, (*OUTSIDE_ALL, *ANYWHERE)))})\.)+")
_INSIDE = re.compile(rf"(?<=\.)(?:{'|'.join(ANYWHERE)})\.")
_ADAPTER = re.compile(r"\.(?:base_layer|lora_[AB]|lora_embedding_[AB])\.")


@dataclass(frozen=True)
class RenamedTensor:
    """A tensor that has another name in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    stored_bytes: int
    name: str

    def read(self) -> Tensor:
        return read_stored(self.file, self.name)

    def read_expert(self, index: int) -> Tensor:
        return read_stored(self.file, self.name, index)

    def read_rows(self, rows: Sequence[int]) -> Tensor:
        return read_stored_rows(self.file, self.name, rows)


def wrapper_of(name: str) -> str:
    """Return what wrappers added to a tensor's name, such as `_orig_mod.`; empty for a plain name."""
    found = _BEGINNING.match(name)
    return (found[0] if found else "") + "".join(_INSIDE.findall(name[found.end() if found else 0 :]))


def unwrapped_name(name: str) -> str:
    return _INSIDE.sub("", _BEGINNING.sub("", name))


def unwrap(checkpoint: Checkpoint, model: nn.Module) -> tuple[Checkpoint, str]:
    """Return the checkpoint with its tensors named as in the model, and what was taken off; "" if nothing was.

    Names that the model has are left, and so are all if two tensors would get one name.
    """
    added = next((part for name in checkpoint.tensors if (part := wrapper_of(name))), "")
    if not added:
        return checkpoint, ""
    renamed = {unwrapped_name(name): _renamed(name, info) for name, info in checkpoint.tensors.items()}
    result = replace(checkpoint, tensors=renamed)
    if len(renamed) < len(checkpoint.tensors) or _found(result, model) <= _found(checkpoint, model):
        return checkpoint, ""
    return result, added


def wrapper_note(added: str) -> str:
    """Return the line that states that names were read without a wrapper's part."""
    return f"the names of the checkpoint's tensors are read, and written, without {added!r}, which a wrapper put there"


def hint(checkpoint: Checkpoint, added: str) -> str:
    """Return what explains, behind an error, why a checkpoint lacks tensors; "" if nothing does."""
    adapter = next((name for name in checkpoint.tensors if _ADAPTER.search(f".{name}")), None)
    if adapter is not None:
        return f"; {adapter} is of an adapter that is not merged: merge it (merge_and_unload) and save the result"
    if added:
        return f"; its names were read without {added!r}, which a wrapper put there"
    first = next(iter(checkpoint.tensors), None)
    return f"; its tensors have other names, such as {first}" if first is not None else ""


def _renamed(name: str, info: TensorInfo) -> TensorInfo:
    if info.encoded is not None or unwrapped_name(name) == name:
        return info
    tensor: EncodedTensor = RenamedTensor(info.dtype, info.shape, info.file, info.bytes, name)
    return replace(info, encoded=tensor)


def _found(checkpoint: Checkpoint, model: nn.Module) -> int:
    """How many of the model's tensors, or layers of experts, the checkpoint has."""
    state = model.state_dict()
    located = TensorLookup(checkpoint.tensors, model, state)
    fused = sum(
        located.find(f"{place}.{source.tensor}") is not None
        for place, module in find_experts(model).items()
        for _, _, source in module.form.parts()
    )
    return fused + sum(located.find(name) is not None for name in state)
