# SPDX-License-Identifier: MIT
"""Statistics of one linear over the calibration text, as solvers read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerStatistics:
    """Sums over all tokens, float32: x is the linear's input in the quantized model, f its input in the float model,
    g the gradient at its outputs.

    Attributes:
        H: sum x x^T, [in, in].
        D: sum x (f - x)^T, [in, in]; None if the float model was not run.
        tokens: the number of tokens.
        G: sum g g^T up to a factor, [out, out]; None if no gradients were measured.
    """

    H: Tensor
    D: Tensor | None
    tokens: int
    G: Tensor | None = None

    @classmethod
    def empty(cls, width: int, float_inputs: bool, device: torch.device) -> LayerStatistics:
        """The statistics of no tokens, for inputs of `width`; with D if `float_inputs`."""
        H = torch.zeros(width, width, device=device)
        return cls(H, torch.zeros_like(H) if float_inputs else None, 0)

    def add(self, x: Tensor, f: Tensor | None) -> None:
        """Add tokens: x and, if there is a D, f; both float32 [tokens, in]."""
        self.H.addmm_(x.T, x)
        self.tokens += len(x)
        if self.D is not None and f is not None:
            self.D.addmm_(x.T, f - x)

    @property
    def importance(self) -> Tensor | None:
        """Weights of the columns [in]: the inputs' second moments; None if all are zero or one is not finite."""
        diagonal = self.H.diagonal()
        return diagonal if bool(torch.isfinite(diagonal).all()) and bool(diagonal.max() > 0) else None

    @property
    def usable_G(self) -> Tensor | None:
        """G; None if it is missing, zero or not finite."""
        G = self.G
        usable = G is not None and bool(torch.isfinite(G).all()) and bool(G.diagonal().max() > 0)
        return G if usable else None
