# SPDX-License-Identifier: MIT
"""Find a model's repeated blocks and the linears inside them; replace a module, or its `forward` for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

Key = TypeVar("Key")


class TransposedLinear(nn.Linear):
    """A linear in the place of GPT-2's Conv1D, whose weight is [in, out] in files."""


@dataclass(frozen=True)
class Block:
    """One of a stack of equal modules, such as a decoder layer; `name` is its path in the model."""

    name: str
    module: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (full name, module) of every linear layer inside, in definition order."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{self.name}.{name}" if name else self.name, module


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the repeated blocks of a model, in order: the members of its outermost module lists that hold linears.

    Found by structure, not by name, so decoders, encoders and towers are all found; what is outside of them
    (embeddings, heads, final norms) is not quantized by default.
    """
    blocks: list[Block] = []
    _walk(model, "", blocks)
    return blocks


def _walk(module: nn.Module, prefix: str, blocks: list[Block]) -> None:
    for name, child in module.named_children():
        place = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and any(isinstance(m, (nn.Linear, Conv1D)) for m in child.modules()):
            blocks += [Block(f"{place}.{index}", member) for index, member in enumerate(child)]
        else:
            _walk(child, f"{place}.", blocks)


def find_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return every linear layer inside the model's blocks, with its full name."""
    return [pair for block in find_blocks(model) for pair in block.linears()]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


@contextmanager
def replaced_forwards(
    modules: Iterable[tuple[Key, nn.Module]], make_forward: Callable[[Key, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, each module of the (key, module) pairs runs `make_forward(key, module)` in place of its own `forward`."""
    own: list[tuple[nn.Module, dict[str, Any]]] = []  # accelerate keeps a forward of its own in the instance
    try:
        for key, module in modules:
            replacement = make_forward(key, module)
            own.append((module, {name: value for name, value in vars(module).items() if name == "forward"}))
            module.forward = replacement
        yield
    finally:
        for module, before in reversed(own):
            del module.forward
            vars(module).update(before)


def conv1d_linears(model: nn.Module) -> list[tuple[str, Conv1D]]:
    """Return (full name, module) of every Conv1D: a linear with its weight transposed."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
