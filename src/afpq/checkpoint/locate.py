# SPDX-License-Identifier: MIT
"""Find the checkpoint's tensor for a name of the model, and check the shapes of packed tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from afpq.checkpoint.reader import TensorInfo, read_tensor
from afpq.errors import AfpqError
from afpq.model.embedding import AfpqTiedHead
from afpq.model.linear import PackedModule
from afpq.model.renamed_tensors import TensorNames
from afpq.numerics.packing import layout


class TensorLookup:
    """The tensors of a checkpoint by the names of a model, which may differ by the base model's prefix too.

    `other_base` is the prefix in the checkpoint of the model's base, if it is not the model's own.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], model: nn.Module, known: Iterable[str] = ()) -> None:
        """`known`: names of the model that are not renamed if the checkpoint has them."""
        self.names, taken = TensorNames(model), set(known)
        self.tensors, self.base = tensors, getattr(model, "base_model_prefix", "")
        renamed = {(name if name in taken else self.names.in_model(name)): name for name in tensors}
        self.other_base = _other_base(model, self.base, renamed)
        if self.other_base is not None:
            old, new = f"{self.other_base}.", f"{self.base}."
            renamed = {(new + n.removeprefix(old) if n.startswith(old) else n): name for n, name in renamed.items()}
        self.by_model_name = renamed

    def find(self, name: str) -> str | None:
        """Return the checkpoint's name of the model's tensor `name`; None if it has none."""
        found = self.full(name)
        return None if found is None else self.by_model_name[found]

    def full(self, name: str) -> str | None:
        """Return `name` with or without the base model's prefix, as the checkpoint has it; None if it has neither."""
        candidates = (name, f"{self.base}.{name}", name.removeprefix(f"{self.base}."))
        return next((n for n in candidates if n in self.by_model_name), None)

    def base_renaming(self) -> tuple[str, str] | None:
        """Return the base model's (prefix in the checkpoint, prefix in the model) if Transformers cannot match them."""
        return None if self.other_base is None else (self.other_base, self.base)

    def holds_any(self, start: str) -> bool:
        """Whether the checkpoint has a tensor whose name begins so, with or without the base model's prefix."""
        starts = (start, f"{self.base}.{start}", start.removeprefix(f"{self.base}."))
        return any(name.startswith(starts) for name in self.by_model_name)

    def hold_different_values(self, name: str, other: str) -> bool:
        """Whether the checkpoint holds both of the model's tensors, with different values. Raises as `read_tensor`."""
        found, against = self.find(name), self.find(other)
        if found is None or against is None or found == against:
            return False
        return not torch.equal(*(read_tensor(self.tensors[n], n) for n in (found, against)))

    def require(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
        """Find a tensor; raises AfpqError if it is missing or has another dtype or shape."""
        found = self.find(name)
        if found is None:
            raise AfpqError(f"tensor {name} is not in the checkpoint; its files or its config are incomplete")
        info = self.tensors[found]
        if (info.dtype, info.shape) != (dtype, shape):
            raise AfpqError(
                f"{info.file}: tensor {found} is {info.dtype} {info.shape}; the config needs {dtype} {shape}"
            )
        return found


def _other_base(model: nn.Module, base: str, names: Iterable[str]) -> str | None:
    """Return the prefix under which the names have all of the base model's modules; None if it is `base`, or none.

    Some classes with a head call the base model otherwise than the class it was saved from.
    """
    inner = getattr(model, base, None) if base else None
    names = list(names)
    if not isinstance(inner, nn.Module) or any(name.startswith(f"{base}.") for name in names):
        return None
    own, inside = dict(model.named_modules()), dict(inner.named_modules())
    starts: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        starts.setdefault(first, []).append(rest.rpartition(".")[0])
    found = [
        first
        for first, rests in starts.items()
        if first not in own and first not in inside and all(rest and rest in inside for rest in rests)
    ]
    return found[0] if len(found) == 1 else None


def saved_name(name: str, located: TensorLookup) -> str:
    """Return the name that the config's patterns refer to: with the base model's prefix, even without the head."""
    for part in ("weight", "qweight"):
        found = located.full(f"{name}.{part}")
        if found is not None:
            return found.removesuffix(f".{part}")
    return name


def check_headers(model: PreTrainedModel, located: TensorLookup) -> None:
    """Check that the checkpoint has every packed module's tensors. Raises AfpqError naming the first at fault."""
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        if not isinstance(module, AfpqTiedHead):
            for part, (dtype, shape) in layout(module.scheme, module.rows, module.columns).items():
                located.require(f"{name}.{part}", dtype, shape)
        if getattr(module, "bias", None) is None or f"{name}.bias" in model.all_tied_weights_keys:
            continue
        if located.find(f"{name}.bias") is None:
            raise AfpqError(f"tensor {name}.bias is not in the checkpoint; its files or its config are incomplete")
