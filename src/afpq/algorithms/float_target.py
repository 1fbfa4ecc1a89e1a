# SPDX-License-Identifier: MIT
"""Aim a layer at the outputs of the float model, though its inputs come from quantized layers (as GPTAQ, 2504.02692).

With x the input in the quantized model and f the one in the float model, the layer should compute W f from x. The best
weight for that, before rounding, is the least-squares solution of W* x = W f over all tokens:
W* = W + W D^T H^-1, where H = sum x x^T and D = sum x (f - x)^T. Rounding then minimises tr((Q-W*) H (Q-W*)^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from afpq.algorithms.gptq import SingularHessian


def toward_float_outputs(W: Tensor, H: Tensor, D: Tensor, damp: float) -> Tensor:
    """Return W* [out, in] for W float32 [out, in], H and D [in, in]; H is damped by `damp` times its mean diagonal.

    Raises SingularHessian if the damped H is not positive definite, or the result not finite.
    """
    damped = H.float().clone()
    damped.diagonal().add_(damp * H.diagonal().mean())
    L, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise SingularHessian("the inputs' second moment is singular")
    change = torch.cholesky_solve(D.float() @ W.T, L).T
    if not bool(torch.isfinite(change).all()):
        raise SingularHessian("the correction is not finite")
    return W + change
