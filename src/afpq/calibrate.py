# SPDX-License-Identifier: MIT
"""Run a model block by block: what enters the blocks, what each linear sees, what leaves.

Only one block is ever in memory. The first step runs the model around its blocks with every block's `forward` replaced
by a recorder that hands its input on: this yields the embeddings and, for each block, the other arguments the model
gives it (positions, masks), whatever the architecture. After that a block is a function of hidden states alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from afpq.blocks import Block
from afpq.errors import AfpqError

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block, besides the hidden states it passes first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tuple_result: bool  # whether the model takes element 0 of what a block returns

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        result = block(hidden, *self.args, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same tensor, such as q, k and v; names within the block."""

    linears: tuple[str, ...]


@dataclass
class Moments:
    """Sums over all tokens of a stage's input x in the quantized model and f in the float one (float32).

    H = sum x x^T and, where the float model runs beside, D = sum x (f - x)^T.
    """

    H: Tensor
    D: Tensor | None
    tokens: int


class Inputs(Protocol):
    """What enters a block: a batch of it is tensor[rows]."""

    @property
    def tensor(self) -> Tensor: ...

    def batches(self, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
        """(rows, tensor[rows] on the device), batch after batch."""
        ...


class Activations:
    """Hidden states of all windows, [windows, length, width] float32, in a file: memory that can be reclaimed."""

    def __init__(self, path: Path, shape: tuple[int, ...], create: bool) -> None:
        self.path, size = path, torch.Size(shape).numel()
        if create:
            _reserve(path, 4 * size)
        elif not path.exists() or path.stat().st_size != 4 * size:
            raise AfpqError(f"{path}: missing or of another size; start again with --no-resume")
        self.tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)

    def batches(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """(windows, their hidden states) in batches of equal size."""
        size = batch_size(*self.tensor.shape[:2])
        for first in range(0, len(self.tensor), size):
            rows = slice(first, first + size)
            yield rows, self.tensor[rows].to(device)

    def sample(self, device: torch.device) -> Tensor:
        """One batch of windows spread evenly over all: what a search with many forward passes can afford."""
        size = batch_size(*self.tensor.shape[:2])
        return self.tensor[torch.linspace(0, len(self.tensor) - 1, size).round().long()].to(device)


def _reserve(path: Path, size: int) -> None:
    """A file of zeros whose blocks are there. Raises OSError where the disk is too small.

    A file that is only long enough has none until it is written, and a memory map that finds no block while it is
    written ends the process with SIGBUS.
    """
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        for first in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - first)))


def batch_size(windows: int, length: int) -> int:
    """Windows in a batch: what BATCH_TOKENS holds, and a divisor of all, since calls are recorded for one size."""
    most = max(1, BATCH_TOKENS // length)
    return max(size for size in range(1, most + 1) if windows % size == 0)


def capture(
    model: nn.Module, blocks: list[Block], windows: Tensor, write: Callable[[str, slice, Tensor], None]
) -> dict[str, BlockCall]:
    """Run the model around its blocks; `write(block, rows, hidden)` receives what enters the first block of all run.

    The model's parameters outside the blocks are real, those inside may be on the meta device. Returns the call of
    each block by its name, in the order they run; a block that text does not reach, such as an image tower's, has none.
    Raises AfpqError where a block cannot be run alone: where the calls depend on the text, or hidden states are changed
    between blocks.
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
            except (IndexError, AttributeError, TypeError, RuntimeError, ValueError) as error:
                if tuple_result:
                    reason = " ".join(str(error).split())[:200]
                    raise AfpqError(
                        f"cannot run this architecture block by block ({reason}); use --method rtn"
                    ) from None
                continue
        calls = {name: call for name, _, call in seen}
        # Recorders hand on what they get, so every block gets the same, unless the model changes it on the way.
        if seen and len(calls) == len(seen) and all(torch.equal(hidden, seen[0][1]) for _, hidden, _ in seen):
            return seen[0][1], calls
    raise AfpqError("this architecture does not simply call its blocks one after the other; use --method rtn")


@contextmanager
def _recorders(blocks: list[Block], seen: list[tuple[str, Tensor, BlockCall]], tuple_result: bool) -> Iterator[None]:
    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            # The first is copied, to be compared with what the others get, should the model change it in place.
            seen.append((name, hidden if seen else hidden.clone(), BlockCall(rest, kwargs, tuple_result)))
            return (hidden,) if tuple_result else hidden

        return record

    try:
        for block in blocks:
            block.module.forward = recorder(block.name)
        yield
    finally:
        for block in blocks:
            del block.module.forward


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b if isinstance(a, (int, float, str, bool, type(None))) else True)


def move(value: Any, device: torch.device) -> Any:
    """Tensors anywhere inside tuples, lists and dicts to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(move(v, device) for v in value)
    if isinstance(value, dict):
        return {key: move(v, device) for key, v in value.items()}
    return value


def materialize(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of a module on the meta device with these parameters (names within it), float32, on `device`.

    Raises AfpqError for a parameter that is not given.
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
def find_stages(block: nn.Module, names: list[str], call: BlockCall, hidden: Tensor) -> list[Stage]:
    """The block's linears `names`, grouped by the tensor they read, in the order they run; unused ones are left out."""
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            for tensor, readers in seen:
                if tensor is args[0]:
                    readers.append(name)
                    return
            seen.append((args[0], [name]))

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        call(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [Stage(tuple(dict.fromkeys(readers))) for _, readers in seen]


class _Stop(Exception):
    """Ends a forward pass once the tensor it was run for is there."""


@torch.no_grad()
def arguments_of(
    block: nn.Module, inside: str, call: BlockCall, hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the block gives to the module called `inside` when it gets `hidden`; nothing behind that is run.

    Raises AfpqError where the module is not called.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stop

    handle = block.get_submodule(inside).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call(block, hidden)
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise AfpqError(f"{inside}: is not called when its block is run; use --method rtn")


def input_of(block: nn.Module, linear: str, call: BlockCall, hidden: Tensor) -> Tensor:
    """What the linear reads when the block gets `hidden`: [tokens, in], float32."""
    x: Tensor = arguments_of(block, linear, call, hidden)[0][0]
    return x.flatten(0, -2).float()


def collect(
    stage: Stage, call: BlockCall, block: nn.Module, inputs: Inputs, float_block: nn.Module | None,
    float_inputs: Inputs | None, device: torch.device,
) -> Moments:  # fmt: skip
    """The moments of a stage's input over all windows; D needs the float model's block and inputs."""
    moments: Moments | None = None
    for rows, hidden in inputs.batches(device):
        x = input_of(block, stage.linears[0], call, hidden)
        if moments is None:
            H = torch.zeros(x.shape[1], x.shape[1], device=device)
            moments = Moments(H, None if float_block is None else torch.zeros_like(H), 0)
        moments.H.addmm_(x.T, x)
        moments.tokens += len(x)
        if float_block is not None and float_inputs is not None and moments.D is not None:
            f = input_of(float_block, stage.linears[0], call, float_inputs.tensor[rows].to(device))
            moments.D.addmm_(x.T, f - x)
    assert moments is not None
    return moments


@torch.no_grad()
def advance(block: nn.Module, call: BlockCall, inputs: Inputs, outputs: Activations, device: torch.device) -> None:
    """Outputs of the block for all windows. Raises AfpqError if they are not finite."""
    for rows, hidden in inputs.batches(device):
        result = call(block, hidden)
        if not bool(torch.isfinite(result).all()):
            raise AfpqError("the block's outputs are NaN or Inf on the calibration text; its weights may be damaged")
        outputs.tensor[rows] = result.float().cpu()
