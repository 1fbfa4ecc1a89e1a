# SPDX-License-Identifier: MIT
"""Walk a model: its repeated blocks, the linears inside them, replacing one module by another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Linear):
    """A linear whose weight is [in, out] in files, as GPT-2's: what takes a Conv1D's place."""


@dataclass(frozen=True)
class Block:
    """One of a stack of equal modules, such as a decoder layer; `name` is its place in the model."""

    name: str
    module: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(full name, module) of every linear layer inside, in definition order."""
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{self.name}.{name}" if name else self.name, module


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks of a model, in order: the members of its outermost lists of modules that hold linears.

    Found by walking, not by name, so decoders, encoders and towers are all found; what stands outside of them
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
    """Every linear layer inside the model's blocks, with its full name."""
    return [pair for block in find_blocks(model) for pair in block.linears()]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def conv1d_linears(model: nn.Module) -> list[tuple[str, Conv1D]]:
    """(full name, module) of every Conv1D: a linear with its weight transposed."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
