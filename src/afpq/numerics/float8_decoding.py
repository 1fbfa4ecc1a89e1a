# SPDX-License-Identifier: MIT
"""Decode float8 weights: each value times the scale of its block; per tensor and per channel are blocks too."""

from __future__ import annotations

from torch import Tensor


def decode_float8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each value by the scale of its block, rounded once.

    `weight` float8 [out, in] and `scales` float [ceil(out / block[0]), ceil(in / block[1])] -> float32 [out, in]; the
    blocks at the ends may be cut.
    """
    decoded = weight.float()
    columns = scales.float()
    if columns.shape[1] > 1:  # a scale of a whole row is broadcast, not written out
        columns = columns.repeat_interleave(block[1], dim=1)[:, : decoded.shape[1]]
    if block[0] == 1:
        return decoded.mul_(columns)
    for index, row in enumerate(columns):
        decoded[index * block[0] : (index + 1) * block[0]] *= row
    return decoded
