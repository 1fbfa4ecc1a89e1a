# SPDX-License-Identifier: MIT
"""Capture how a model calls its blocks, and run a block alone on the hidden states of all windows.

Only one block is ever in memory. The model runs once with every block's `forward` replaced by a recorder that returns
its input: this yields the embeddings and, for each block, the other arguments the model passes (positions, masks),
whatever the architecture. After that a block is a function of hidden states alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.calibration.hidden_states import Activations, Inputs, batch_size
from afpq.errors import AfpqError, named_lack_of_memory, one_line, out_of_memory
from afpq.model.blocks import Block, replaced_forwards


@dataclass(frozen=True)
class BlockCall:
    """The arguments with which the model calls a block, after the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tuple_result: bool  # whether the model takes element 0 of a block's result

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        return first_of(block(hidden, *self.args, **self.kwargs))


def first_of(result: Any) -> Tensor:
    """Return a module's result, or element 0 of a tuple: the hidden states."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def capture(
    model: nn.Module, blocks: list[Block], windows: Tensor, write: Callable[[str, slice, Tensor], None]
) -> dict[str, BlockCall]:
    """Run the model around its blocks; `write(block, rows, hidden)` receives the inputs of the first that runs.

    The model's parameters outside the blocks are real, those inside may be on the meta device. Returns each block's
    call by its name, in the order they run; a block that text does not reach, such as an image tower's, has none.
    Raises AfpqError if a block cannot be run alone (its call depends on the text, or hidden states change between
    blocks), and for a lack of memory.
    """
    size = batch_size(*windows.shape)
    calls: dict[str, BlockCall] = {}
    for start in range(0, len(windows), size):
        rows = slice(start, start + size)
        hidden, these = _capture_batch(model, blocks, windows[rows])
        write(next(iter(these)), rows, hidden)
        pairs = zip(calls.values(), these.values())
        if calls and not (
            list(calls) == list(these) and all(_equal((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in pairs)
        ):
            raise AfpqError("this architecture passes more than hidden states between blocks; use --method rtn")
        calls = calls or these
    return calls


def _capture_batch(model: nn.Module, blocks: list[Block], ids: Tensor) -> tuple[Tensor, dict[str, BlockCall]]:
    for tuple_result in (False, True):
        seen: list[tuple[str, Tensor, BlockCall]] = []
        with _recorders(blocks, seen, tuple_result), torch.no_grad():
            try:
                getattr(model, "base_model", model)(ids, use_cache=False)
            except (IndexError, AttributeError, TypeError, RuntimeError, ValueError, MemoryError) as error:
                if (full := out_of_memory(error)) is not None:
                    raise full from None
                if tuple_result:
                    reason = one_line(error)
                    raise AfpqError(
                        f"cannot run this architecture block by block ({reason}); use --method rtn"
                    ) from None
                continue
        calls = {name: call for name, _, call in seen}
        # Recorders return their input, so every block gets the same, unless the model changes it between blocks.
        if seen and len(calls) == len(seen) and all(torch.equal(hidden, seen[0][1]) for _, hidden, _ in seen):
            return seen[0][1], calls
    raise AfpqError("this architecture does not simply call its blocks one after the other; use --method rtn")


def _recorders(
    blocks: list[Block], seen: list[tuple[str, Tensor, BlockCall]], tuple_result: bool
) -> AbstractContextManager[None]:
    def recorder(name: str, _module: nn.Module) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            # The first is copied for the comparison with the others: the model may change it in place.
            seen.append((name, hidden if seen else hidden.clone(), BlockCall(rest, kwargs, tuple_result)))
            return (hidden,) if tuple_result else hidden

        return record

    return replaced_forwards(((block.name, block.module) for block in blocks), recorder)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b if isinstance(a, (int, float, str, bool, type(None))) else True)


def move(value: Any, device: torch.device) -> Any:
    """Move tensors anywhere inside tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    if isinstance(value, dict):
        return {key: move(v, device) for key, v in value.items()}
    return value


def materialize(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Copy a module from the meta device, with these parameters (names within it) in float32 on `device`.

    Raises AfpqError for a missing parameter.
    """
    real = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        if name not in tensors:
            raise AfpqError(f"parameter {name} is stored under another name; use --method rtn for this architecture")
        parent, _, leaf = name.rpartition(".")
        dtype = torch.float32 if parameter.is_floating_point() else tensors[name].dtype
        value = tensors[name].to(device, dtype).contiguous()
        setattr(real.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    return real.to(device).eval()


@torch.no_grad()
@named_lack_of_memory()
def advance(block: nn.Module, call: BlockCall, inputs: Inputs, outputs: Activations, device: torch.device) -> None:
    """Run the block on all windows and store its outputs.

    Raises AfpqError if they are not finite, and for a lack of memory.
    """
    for rows, hidden in inputs.batches(device):
        result = call(block, hidden)
        if not bool(torch.isfinite(result).all()):
            raise AfpqError("the block's outputs are NaN or Inf on the calibration text; its weights may be damaged")
        outputs.tensor[rows] = result.float().cpu()
