# SPDX-License-Identifier: MIT
"""Decode MXFP4: 4-bit values (E2M1) in groups of 32 that share an exponent of 8 bits (E8M0)."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_BYTES = 16  # 32 values of 4 bits, the first in the low half of the first byte
NO_NUMBER = 255  # the exponent that stands for NaN

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = torch.tensor((*_VALUES, *(-value for value in _VALUES)))
_E8M0 = torch.tensor([2.0 ** (exponent - 127) for exponent in range(NO_NUMBER)] + [torch.nan])


def decode_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """uint8 [rows, groups, 16] and uint8 [rows, groups] -> float32 [rows, 32 * groups], exact."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return (_E2M1[codes.int()] * _E8M0[exponents.int()].unsqueeze(-1)).flatten(-2)
