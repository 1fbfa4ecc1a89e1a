# SPDX-License-Identifier: MIT
"""GroupScales: the scales of a weight's groups, and joining them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from afpq.numerics.scale_storage import ScaleGrid


@dataclass(frozen=True)
class GroupScales:
    """Scales of groups, all of one shape [..., groups], in the `memory_dtype` of their storage.

    - `pos`, `neg`: scales of values >= 0 and of values < 0; both are negative if the group's codebook is mirrored.
      `neg` is `pos` itself unless there are two scales.
    - `zero`: uint8 codes of the zero points; None unless the scheme has them.
    - `grid`: what the scales lie on; None unless their storage needs it.
    """

    pos: Tensor
    neg: Tensor
    zero: Tensor | None = None
    grid: ScaleGrid | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> GroupScales:
        """Return the scales with `function` applied to each side, once if both sides are one; the rest is kept."""
        pos = function(self.pos)
        return replace(self, pos=pos, neg=pos if self.neg is self.pos else function(self.neg))

    def float(self) -> GroupScales:
        """Return the scales in float32."""
        return self.map(Tensor.float)

    def __getitem__(self, index: object) -> GroupScales:
        """Index all tensors alike."""
        chosen = self.map(lambda side: side[index])  # type: ignore[index]
        return chosen if self.zero is None else replace(chosen, zero=self.zero[index])  # type: ignore[index]

    @classmethod
    def cat(cls, parts: Sequence[GroupScales], dim: int = 0) -> GroupScales:
        """Join the scales of parts of one weight along `dim`. All must be of one scheme and on one grid."""
        return _joined(parts, lambda tensors: torch.cat(tensors, dim))

    @classmethod
    def stack(cls, parts: Sequence[GroupScales], dim: int = 0) -> GroupScales:
        """Join the scales of parts of one weight along a new `dim`. All must be of one scheme and on one grid."""
        return _joined(parts, lambda tensors: torch.stack(tensors, dim))


def _joined(parts: Sequence[GroupScales], join: Callable[[list[Tensor]], Tensor]) -> GroupScales:
    pos = join([part.pos for part in parts])
    neg = pos if all(part.neg is part.pos for part in parts) else join([part.neg for part in parts])
    zeros = [part.zero for part in parts if part.zero is not None]
    grids = {part.grid for part in parts}
    if len(zeros) not in (0, len(parts)) or len(grids) > 1:
        raise ValueError("parts of one weight must have zero points in common, and one grid")
    return GroupScales(pos, neg, join(zeros) if zeros else None, grids.pop())
