# SPDX-License-Identifier: MIT
"""The place of a model's tensor in its checkpoint: a whole tensor of a file, or a part of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorPart:
    """The part of a checkpoint's tensor that is a tensor of the model; without options all of it.

    `expert` is an index of its first dimension, `rows` a (start, stop, step) of its outputs; `transposed`: the matrix
    is stored as [in, out].
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.expert is None and self.rows is None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part, [out, in] or [out], as a view."""
        part = tensor if self.expert is None else tensor[self.expert]
        if self.transposed and part.ndim == 2:
            part = part.T
        return part if self.rows is None else part[slice(*self.rows)]
