# SPDX-License-Identifier: MIT
"""A layer to be solved: its weight and correlated inputs, for tests of all methods that read inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(rows: int = 24, columns: int = 96, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W, X, H) with correlated inputs of very different sizes, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    X = torch.randn(tokens, columns, generator=generator) @ mix * sizes
    return torch.randn(rows, columns, generator=generator) * 0.02, X, X.T @ X
