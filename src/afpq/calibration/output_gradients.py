# SPDX-License-Identifier: MIT
"""Second moments of the gradients of linears' outputs: the weight of output errors in the loss (Fisher information).

Before the first block is quantized, one forward and one backward pass of the float model stores the gradients behind
every block (`backward.py`). When a block is solved, it runs backwards once more from those, with hooks on its linears.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afpq.calibration.backward import FloatModelPass, step_back
from afpq.calibration.capture import BlockCall
from afpq.calibration.hidden_states import Activations
from afpq.calibration.linear_hooks import SecondMoment, with_hooks

EXPERTS_BYTES = 2**32  # of gradients' second moments in a block; experts that need more are solved without


def store_gradients(walk: FloatModelPass, seed: int) -> None:
    """Store the gradients behind every block in the scratch directory of `walk`, unless they are there.

    Raises AfpqError if the architecture predicts no tokens or cannot be run backwards.
    """
    done = walk.scratch / "gradients.done"
    if not done.exists():
        walk.forwards()
        walk.keep_gradients(seed, partial(gradients_file, walk.scratch))
        done.touch()


def gradients_file(scratch: Path, index: int) -> Path:
    """Return the file of the gradients behind block `index`."""
    return scratch / f"gradients-{index}.bin"


def output_second_moments(
    block: nn.Module, call: BlockCall, names: Sequence[str], inputs: Activations, behind: Activations,
    device: torch.device,
) -> dict[str, Tensor]:  # fmt: skip
    """Compute G of the block's linears `names`, [out, out] float32: the mean over tokens of g g^T, g the gradient.

    `block`, `inputs` and the gradients `behind` are the float model's. Linears that are not run are left out. G is
    shrunk towards its diagonal by out / (out + tokens), the share of noise in its other elements with so few tokens.
    """
    sums: dict[str, SecondMoment] = {}
    step_back(block, call, inputs, behind, device, partial(_recording, names, sums))
    return {name: _shrunk(gram) for name, gram in sums.items()}


def _shrunk(gram: SecondMoment) -> Tensor:
    G = gram.matrix()
    diagonal = G.diagonal() / gram.tokens
    G = G / (gram.tokens + len(G))
    G.diagonal().copy_(diagonal)
    return G


@contextmanager
def _recording(names: Sequence[str], sums: dict[str, SecondMoment], block: nn.Module, _rows: slice) -> Iterator[None]:
    def add(name: str, gradient: Tensor) -> None:
        sums.setdefault(name, SecondMoment()).add(gradient.detach().flatten(0, -2).float())

    def hook(name: str, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, name))

    with with_hooks(block, names, hook):
        yield
