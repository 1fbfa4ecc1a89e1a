# SPDX-License-Identifier: MIT
"""Find a model's repeated blocks and the linears inside them; replace a module, or its `forward` for a while.

A layer is taken only if it computes x @ weight.T + bias and nothing else (`why_left`): routers that return two tensors,
scaled or grouped linears and the like keep their class and their weight.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

Key = TypeVar("Key")

# Forwards that differ from nn.Linear's in their text only; a test holds each to that.
HARMLESS = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear.forward"})


class TransposedLinear(nn.Linear):
    """A linear in the place of GPT-2's Conv1D, whose weight is [in, out] in files."""


@dataclass(frozen=True)
class Block:
    """One of a stack of equal modules, such as a decoder layer; `name` is its path in the model."""

    name: str
    module: nn.Module

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Yield (full name, module) of every linear layer inside that can be replaced, in definition order."""
        for name, module in self.module.named_modules():
            if is_linear(module):
                yield f"{self.name}.{name}" if name else self.name, module


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear that a packed layer can replace."""
    return isinstance(module, nn.Linear) and why_left(module) is None


def why_left(module: nn.Module) -> str | None:
    """Return why a linear or Conv1D cannot be replaced, in words; None for one that can, and for any other module.

    It can if nothing but its class's forward, which is torch's or Transformers' own, computes its output.
    """
    kind = next((kind for kind in (nn.Linear, Conv1D) if isinstance(module, kind)), None)
    if kind is None:
        return None
    name, held = type(module).__name__, vars(module)
    if module._parameters.get("weight") is None or hasattr(type(module), "weight"):
        return f"{name} computes its weight"
    forward = held.get("_old_forward") if "_hf_hook" in held else held.get("forward")  # accelerate's, around it
    function = getattr(forward or type(module).forward, "__func__", forward or type(module).forward)
    place = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    own = function is not kind.forward and place not in HARMLESS
    if own or type(module).__call__ is not nn.Module.__call__:
        return f"{name} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has hooks"
    return None


def left_linears(model: nn.Module) -> dict[str, str]:
    """Return name -> `why_left` for all linears and Conv1D that cannot be replaced, inside the blocks or not."""
    found = ((name, why_left(module)) for name, module in model.named_modules())
    return {name: reason for name, reason in found if reason is not None}


def left_in_blocks(model: nn.Module) -> dict[str, str]:
    """Return those of `left_linears` that are in the blocks."""
    blocks = {block.name for block in find_blocks(model)}
    return {name: reason for name, reason in left_linears(model).items() if in_blocks(name, blocks)}


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the repeated blocks of a model, in order: the members of its outermost module lists that hold linears.

    Found by structure, not by name, so decoders, encoders and towers are all found; what is outside of them
    (embeddings, heads, final norms) is not quantized by default. Output heads that are a list are no blocks.
    """
    blocks: list[Block] = []
    _walk(model, "", blocks, {id(end(module, "get_output_embeddings")) for module in model.modules()})
    return blocks


def end(model: nn.Module, getter: str) -> Any:
    """Return what a model of Transformers declares as its embedding or its head; None for any other module."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # not a model of Transformers, or one without this end
        return None


def _walk(module: nn.Module, prefix: str, blocks: list[Block], heads: Container[int]) -> None:
    for name, child in module.named_children():
        place = f"{prefix}{name}"
        if id(child) in heads:
            continue
        if isinstance(child, nn.ModuleList) and any(isinstance(m, (nn.Linear, Conv1D)) for m in child.modules()):
            blocks += [Block(f"{place}.{index}", member) for index, member in enumerate(child)]
        else:
            _walk(child, f"{place}.", blocks, heads)


def in_blocks(name: str, blocks: Container[str]) -> bool:
    """Whether a module or tensor is one of the blocks called `blocks`, or inside one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in blocks for length in range(1, len(parts) + 1))


def find_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return every linear layer inside the model's blocks that can be replaced, with its full name."""
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
    """Return (full name, module) of every Conv1D that can be replaced: a linear with its weight transposed."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Conv1D))
    return [(name, module) for name, module in found if why_left(module) is None]
