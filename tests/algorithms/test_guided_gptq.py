# SPDX-License-Identifier: MIT
"""GPTQ on both sides: against GPTQ on the whole Kronecker product, and on properties that must hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problem import problem
from torch import Tensor

from afpq.algorithms import SingularHessian, quantize_gptq, quantize_guided, quantize_rtn
from afpq.algorithms import guided_gptq as two_sided
from afpq.algorithms.guided_gptq import HEIGHT, PARTS, split_rows
from afpq.algorithms.solver_options import GptqOptions
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import decode_groups, encode_groups
from afpq.numerics.scales import fit_scales
from afpq.numerics.scheme import parse_scheme

SCHEME = parse_scheme("nf3-asym-g32")


def gradients(rows: int, seed: int = 0, rank: int = 6, tokens: int = 2000) -> Tensor:
    """G of outputs whose gradients have a few directions in common, and very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, rows, generator=generator)
    g = shared + 0.3 * torch.randn(tokens, rows, generator=generator)
    g = g * torch.exp(torch.randn(rows, generator=generator))
    return g.T @ g / tokens


def loss(Q: Tensor, W: Tensor, H: Tensor, G: Tensor) -> float:
    E = (Q - W).double()
    return ((G.double() @ E @ H.double()) * E).sum().item()


def test_it_trades_the_error_of_outputs_for_that_of_predictions() -> None:
    W, _, H = problem(rows=48)
    G = gradients(48)
    one, two = (f(W, H, *more, SCHEME)[0].dequantize() for f, more in ((quantize_gptq, ()), (quantize_guided, (G,))))
    assert loss(two, W, H, G) < 0.75 * loss(one, W, H, G)
    same = torch.eye(48)
    assert loss(two, W, H, same) > loss(one, W, H, same)


def test_without_gradients_to_tell_rows_apart_it_is_gptq() -> None:
    W, _, H = problem(rows=40)
    options = GptqOptions(sweeps=0)
    one, _ = quantize_gptq(W, H, SCHEME, options)
    two, _ = quantize_guided(W, H, 3 * torch.eye(40), SCHEME, options)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.scales.pos, two.scales.pos)


def damped(A: Tensor) -> Tensor:
    A = A.double().clone()
    A.diagonal().add_(0.01 * A.diagonal().mean())
    return A


@pytest.mark.parametrize("seed", range(4))
def test_rows_one_by_one_are_gptq_of_the_kronecker_product(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With a row in each part: the codes of plain GPTQ over all weights at once, whose Hessian is G x H (float64)."""
    monkeypatch.setattr(two_sided, "split_rows", lambda diagonal: [slice(row, row + 1) for row in range(7)])
    W, _, H = problem(rows=7, columns=12, seed=seed)
    G, scheme = gradients(7, seed, rank=3), parse_scheme("nf3-sym-g-1")
    found, _ = quantize_guided(W, H, G, scheme, GptqOptions(order="act", sweeps=0), "absmax")
    rows, columns = (A.diagonal().argsort(descending=True) for A in (G, H))
    K = torch.kron(damped(G)[rows][:, rows], damped(H)[columns][:, columns])
    U = torch.linalg.cholesky(torch.linalg.inv(K)).T
    left, codes = W[rows][:, columns].double().flatten(), torch.empty(7, 12, dtype=torch.uint8)
    for row in range(7):
        scales = fit_scales(left[12 * row : 12 * row + 12].float()[None], FittedScheme(scheme))[:, 0]
        for column in range(12):
            place = 12 * row + column
            code = encode_groups(left[place].float()[None], scales, scheme.format)
            error = (left[place] - decode_groups(code, scales, scheme.format.values).double()) / U[place, place]
            left[place:] -= error * U[place, place:]
            codes[row, column] = code
    assert torch.equal(found.codes[rows][:, columns], codes)


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(["nf3-asym-g32", "nf4-sym-g32-log8", "int4-asym-g24", "fp3-asym-g-1", "learned2-asym-g32"]),
    rows=st.integers(1, 40),
    sweeps=st.sampled_from([0, 2]),
    order=st.sampled_from(["group", "act", "none"]),
    seed=st.integers(0, 99),
)
def test_its_loss_is_never_that_of_rounding_to_nearest(
    scheme: str, rows: int, sweeps: int, order: str, seed: int
) -> None:
    W, _, H = problem(rows=rows, columns=80, seed=seed)
    G = gradients(rows, seed)
    found, damp = quantize_guided(W, H, G, parse_scheme(scheme), GptqOptions(sweeps=sweeps, order=order))
    nearest = quantize_rtn(W, parse_scheme(scheme), "mse", H.diagonal())
    assert found.codes.shape == W.shape and damp == 0.01
    assert loss(found.dequantize(), W, H, G) < loss(nearest.dequantize(), W, H, G)


def test_a_dead_output_does_not_disturb_the_others() -> None:
    W, _, H = problem(rows=20)
    G = gradients(20)
    G[5] = 0
    G[:, 5] = 0
    found, _ = quantize_guided(W, H, G, SCHEME)
    assert torch.isfinite(found.dequantize()).all()
    assert loss(found.dequantize(), W, H, G) < loss(quantize_gptq(W, H, SCHEME)[0].dequantize(), W, H, G)


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_gradients_that_teach_nothing_are_an_error(fill: float) -> None:
    W, _, H = problem(rows=8)
    with pytest.raises(SingularHessian):
        quantize_guided(W, H, torch.full((8, 8), fill), SCHEME)


def test_nan_in_the_weight_is_an_error() -> None:
    W, _, H = problem(rows=8)
    W[3, 3] = torch.nan
    with pytest.raises(AfpqError):
        quantize_guided(W, H, torch.eye(8), SCHEME)


@given(sizes=st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_parts_are_all_rows_once_and_few(sizes: list[float]) -> None:
    parts = split_rows(torch.tensor(sorted(sizes, reverse=True)))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(sizes)))
    assert len(parts) <= PARTS and all(part.stop - part.start >= HEIGHT for part in parts[:-1])


def test_parts_have_equal_shares_of_the_gradients() -> None:
    sizes = torch.logspace(0, -3, 512)
    parts = split_rows(sizes)
    sums = torch.stack([sizes[part].sqrt().sum() for part in parts])
    assert len(parts) == PARTS and torch.allclose(sums, sums.mean(), rtol=0.1)
