# SPDX-License-Identifier: MIT
"""Record, while gradients pass, each linear's inputs and the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class SecondMoment:
    """The sum H of x x^T over tokens x, [in, in]; the tokens themselves while they are fewer than `in`."""

    rows: list[Tensor] = field(default_factory=list)
    H: Tensor | None = None
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Add tokens x [tokens, in], float32."""
        self.rows.append(x)
        self.tokens += len(x)
        if self.H is None and self.tokens > x.shape[1]:
            self.H = x.new_zeros(x.shape[1], x.shape[1])
        if self.H is not None:
            for rows in self.rows:
                self.H.addmm_(rows.T, rows)
            self.rows = []

    def matrix(self) -> Tensor:
        """Return H, [in, in]."""
        if self.H is not None:
            return self.H
        x = torch.cat(self.rows)
        return x.T @ x

    def diagonal(self) -> Tensor:
        """Return H's diagonal, [in]."""
        return torch.cat(self.rows).square().sum(0) if self.H is None else self.H.diagonal()

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """Return the diagonal of A H B^T, [rows], for A and B [rows, in]."""
        if self.H is not None:
            return ((A @ self.H) * B).sum(1)
        x = torch.cat(self.rows)
        return ((x @ A.T) * (x @ B.T)).sum(0)


@dataclass
class LinearStatistics:
    """Statistics of a linear over all tokens.

    `gram`: second moment of its inputs. `gradient` [out]: sums of the squared gradients of its outputs. `growth`
    [windows], float64: sums of gradients times outputs without the bias; zero if only some tokens reach the linear.
    `readers`: the linears that read the same tensor. `outputs`: second moment of the outputs' gradients, if recorded.
    """

    gram: SecondMoment
    gradient: Tensor
    growth: Tensor
    readers: tuple[str, ...]
    outputs: SecondMoment | None = None


@contextmanager
def with_hooks(block: nn.Module, names: Sequence[str], hook: Callable[..., None]) -> Iterator[None]:
    """Inside, hook(name, module, arguments, output) is called after each call of the block's linears `names`."""
    handles = [block.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(
    names: list[str],
    shape: Sequence[int],
    both: Container[str],
    taps: dict[str, LinearStatistics],
    block: nn.Module,
    windows: slice,
) -> Iterator[None]:
    """Inside, add the statistics of the block's linears `names` to `taps`.

    `windows` run inside, out of `shape` (windows, tokens of a window). Linears in `both` also record `outputs`.
    """
    seen: list[tuple[str, Tensor]] = []

    def add(tap: LinearStatistics, output: Tensor, gradient: Tensor) -> None:
        gradient = gradient.detach().flatten(0, -2).float()
        tap.gradient += gradient.square().sum(0)
        if tap.outputs is not None:
            tap.outputs.add(gradient)
        part = tap.growth[windows]
        if len(gradient) == len(part) * shape[1]:
            part += (gradient * output.flatten(0, -2)).double().sum(1).view(len(part), -1).sum(1)

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        first = next((taps[reader] for reader, x in seen if x is args[0]), None)
        seen.append((name, args[0]))
        if name not in taps:
            growth = torch.zeros(shape[0], dtype=torch.float64, device=output.device)
            gram = SecondMoment() if first is None else first.gram
            sizes = torch.zeros(output.shape[-1], device=output.device)
            taps[name] = LinearStatistics(gram, sizes, growth, (), SecondMoment() if name in both else None)
            readers = (*(first.readers if first is not None else ()), name)
            for reader in readers:
                taps[reader].readers = readers
        if output.requires_grad:
            bias = getattr(module, "bias", None)
            value = output.detach().clone() if bias is None else output.detach() - bias
            output.register_hook(partial(add, taps[name], value))

    with with_hooks(block, names, hook):
        yield
    for position, (name, x) in enumerate(seen):
        if not any(x is earlier for _, earlier in seen[:position]):
            taps[name].gram.add(x.detach().flatten(0, -2).float())
