# SPDX-License-Identifier: MIT
"""Where a tensor of a model lies in its checkpoint: a whole tensor of a file, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorPart:
    """Where a tensor of the model is: a tensor of the checkpoint, or a part of it.

    `expert` is an index of its first dimension, `rows` (start, stop, step) of the outputs, and `transposed` tells that
    a matrix is stored as [in, out].
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.expert is None and self.rows is None

    def of(self, tensor: Tensor) -> Tensor:
        """The part, as [out, in] or [out]; a view."""
        part = tensor if self.expert is None else tensor[self.expert]
        if self.transposed and part.ndim == 2:
            part = part.T
        return part if self.rows is None else part[slice(*self.rows)]
