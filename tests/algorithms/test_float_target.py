# SPDX-License-Identifier: MIT
"""The weight that is aimed at is the least-squares solution, and the given one where inputs are equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problem import problem
from torch import Tensor

from afpq.algorithms import SingularHessian, toward_float_outputs


def inputs(rows: int, columns: int, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """(W, X of the quantized model, F of the float model)"""
    W, X, _ = problem(rows, columns, 6 * columns + 20, seed)
    return W, X, X + noise * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed + 1)) * X.std(0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 24), st.integers(0, 999), st.floats(0, 0.5), st.sampled_from([0.01, 0.1]))
def test_it_is_least_squares_in_float64(rows: int, columns: int, seed: int, noise: float, damp: float) -> None:
    """Damping is a penalty on the distance from W: |X W*^T - F W^T|^2 + damp * mean(diagonal) * |W* - W|^2."""
    W, X, F = inputs(rows, columns, seed, noise)
    H = X.T @ X
    found = toward_float_outputs(W, H, X.T @ (F - X), damp)
    penalty = (damp * H.diagonal().mean().double()).sqrt()
    left = torch.cat([X.double(), penalty * torch.eye(columns, dtype=torch.float64)])
    right = torch.cat([F.double() @ W.double().T, penalty * W.double().T])
    best = torch.linalg.lstsq(left, right).solution.T
    assert (found - best).norm() <= 1e-3 * best.norm()


def test_equal_inputs_leave_the_weight_as_it_is() -> None:
    W, X, _ = inputs(4, 16, 0, 0.0)
    assert torch.equal(toward_float_outputs(W, X.T @ X, torch.zeros(16, 16), 0.01), W)


def test_damping_keeps_the_result_near_the_weight() -> None:
    W, X, F = inputs(4, 16, 0, 0.3)
    H, D = X.T @ X, X.T @ (F - X)
    moves = [(toward_float_outputs(W, H, D, damp) - W).norm() for damp in (1e-6, 0.1, 10.0)]
    assert moves[0] > moves[1] > moves[2] > 0


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.full((8, 8), torch.nan), -torch.eye(8)])
def test_moments_that_cannot_be_solved_are_an_error_to_handle(bad: Tensor) -> None:
    with pytest.raises(SingularHessian):
        toward_float_outputs(torch.randn(4, 8), bad, torch.eye(8), 0.01)


def test_a_correction_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(SingularHessian, match="finite"):
        toward_float_outputs(torch.ones(4, 8), torch.eye(8), torch.full((8, 8), torch.inf), 0.01)
