# SPDX-License-Identifier: MIT
"""What a kernel is: a module with these names, and one row in the table of `kernels/__init__.py`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from afpq.kernels.operands import Packed


class Kernel(Protocol):
    """The computations of one kind of device.

    A kernel computes every weight that `Packed.check` accepts: what it has no fast code for it leaves to `reference`.

    Attributes:
        FAST_BITS: bit widths of codes with fast code; any other width is computed by the reference.
        FAST_SCALES: dtypes of stored scales with fast code; the same.
    """

    FAST_BITS: tuple[int, ...]
    FAST_SCALES: tuple[torch.dtype, ...]

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        """Compute x [..., in] @ weight^T + bias [out] -> [..., out], in the dtype of x.

        Raises AfpqError for operands that do not fit together.
        """

    def dequantize(self, weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
        """Decode a weight -> [out, in_features] of a float dtype.

        Raises AfpqError for operands that do not fit together, and for a dtype that is not a float.
        """

    def prepare(self, values: tuple[float, ...], bits: int, device: torch.device) -> None:
        """Make what layers with this codebook keep on `device`, before their first call; may do nothing."""
