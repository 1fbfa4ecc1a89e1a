# SPDX-License-Identifier: MIT
"""GPTQ against the authors' results, against rounding, and on inputs that teach nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problem import problem
from safetensors.torch import load_file
from torch import Tensor

from afpq.algorithms import SingularHessian, quantize_gptq, quantize_rtn, toward_float_outputs
from afpq.algorithms.gptq import factorize
from afpq.algorithms.solver_options import GptqOptions
from afpq.errors import AfpqError
from afpq.numerics.formats import parse_format
from afpq.numerics.scheme import Scheme, parse_scheme

PLAIN = GptqOptions(order="none", sweeps=0)
CASES = [
    f"{format}.{sym}.g{group}"
    for format in ("nf4", "nf3", "fp4", "fp3", "int4", "int3")
    for sym in ("sym", "asym")
    for group in (64, 128, -1)
]


def output_error(Q: Tensor, W: Tensor, X: Tensor) -> float:
    """In float64, from the inputs themselves."""
    X = X.double()
    return (((Q.double() - W.double()) @ X.T).square().sum() / (W.double() @ X.T).square().sum()).item()


@pytest.fixture(scope="module")
def golden() -> tuple[Tensor, Tensor, dict[str, dict[str, float]]]:
    directory = Path(__file__).parents[3] / "shared" / "golden"
    if not directory.is_dir():
        pytest.skip("the authors' results are not here")
    tensors = load_file(directory / "afpq_reference.safetensors")
    losses = json.loads((directory / "afpq_reference_loss.json").read_text())
    return tensors["weight"].float(), tensors["activations"].float(), losses


@pytest.mark.parametrize("case", CASES)
def test_never_worse_than_the_authors(golden: tuple[Tensor, Tensor, dict[str, dict[str, float]]], case: str) -> None:
    W, X, losses = golden
    format, sym, group = case.split(".")
    scheme = Scheme(parse_format(format), int(group[1:]), sym == "sym", "float32")
    plain = output_error(quantize_gptq(W, X.T @ X, scheme, PLAIN, "absmax")[0].dequantize(), W, X)
    # At g64 the authors fit scales on stale weights: ours differ there, and are better in the mean (next test).
    assert plain == pytest.approx(losses[case]["gptq"], rel=0.035 if group == "g64" else 0.02)
    full = output_error(quantize_gptq(W, X.T @ X, scheme)[0].dequantize(), W, X)
    assert full < 0.6 * losses[case]["gptq"]
    if sym == "asym":
        searched = quantize_gptq(W, X.T @ X, scheme, GptqOptions(order="act", sweeps=0), "mse")[0].dequantize()
        assert output_error(searched, W, X) < 0.75 * losses[case]["gptq"]


def test_small_groups_gain_from_fresh_weights(golden: tuple[Tensor, Tensor, dict[str, dict[str, float]]]) -> None:
    W, X, losses = golden
    ratios = []
    for case in CASES:
        format, sym, group = case.split(".")
        if group == "g64":
            scheme = Scheme(parse_format(format), 64, sym == "sym", "float32")
            ours = output_error(quantize_gptq(W, X.T @ X, scheme, PLAIN, "absmax")[0].dequantize(), W, X)
            ratios.append(ours / losses[case]["gptq"])
    assert sum(ratios) / len(ratios) < 1


@pytest.mark.parametrize("order", ["group", "act", "none"])
@pytest.mark.parametrize("scheme", ["nf3-asym-g32", "nf4-sym-g-1", "int3-asym-g40", "int4-sym-g64", "fp4-asym-g200"])
def test_worse_on_weights_better_on_outputs(scheme: str, order: str) -> None:
    W, X, H = problem()
    rounded = quantize_rtn(W, parse_scheme(scheme)).dequantize()
    solved, damp = quantize_gptq(W, H, parse_scheme(scheme), GptqOptions(order=order, sweeps=0), "absmax")
    assert damp == 0.01
    assert output_error(solved.dequantize(), W, X) < 0.8 * output_error(rounded, W, X)
    assert (solved.dequantize() - W).square().sum() > (rounded - W).square().sum()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    scheme=st.sampled_from(["nf4-asym-g32", "nf3-sym-g16", "int3-asym-g7", "fp3-asym-g-1", "nf2-asym-g64"]),
    order=st.sampled_from(["group", "act", "none"]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_gives_finite_weights_no_worse_after_descent(
    rows: int, columns: int, scheme: str, order: str, seed: int
) -> None:
    W, _, H = problem(rows, columns, 80, seed)
    losses = []
    for sweeps in (0, 1, 3):
        solved, damp = quantize_gptq(W, H, parse_scheme(scheme), GptqOptions(order=order, sweeps=sweeps))
        E = (solved.dequantize() - W).double()
        damped = H.double() + damp * H.double().diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        losses.append(((E @ damped) * E).sum().item())
        assert torch.isfinite(solved.dequantize()).all() and solved.codes.shape == W.shape
    assert losses[1] <= losses[0] * (1 + 1e-4) and losses[2] <= losses[1] * (1 + 1e-4)


def test_the_factor_is_the_inverse_upper_cholesky_factor() -> None:
    _, _, H = problem()
    factor = factorize(H, 0.01)
    inverse = torch.linalg.inv(factor.H.double())
    expected = torch.linalg.cholesky(inverse, upper=True)
    assert torch.allclose(factor.U.double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_singular_hessian_is_damped_more() -> None:
    W, X, _ = problem(tokens=3)
    H = X.T @ X - 0.05 * torch.eye(96) * (X.T @ X).diagonal().mean()  # indefinite: the first dampings must fail
    solved, damp = quantize_gptq(W, H, parse_scheme("nf3-asym-g32"))
    assert damp > 0.01 and torch.isfinite(solved.dequantize()).all()


def test_dead_inputs_are_rounded_to_nearest() -> None:
    W, X, _ = problem()
    X[:, 10:20] = 0
    scheme = parse_scheme("nf4-asym-g32")
    solved, _ = quantize_gptq(W, X.T @ X, scheme, GptqOptions(order="none", sweeps=0), "absmax")
    assert torch.isfinite(solved.dequantize()).all()
    step = 0.31 / 2 * torch.maximum(solved.scales.pos, solved.scales.neg).float()[:, :1]
    assert ((solved.dequantize() - W)[:, 10:20].abs() <= step + 1e-3).all()


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.full((8, 8), torch.nan), torch.full((8, 8), torch.inf)])
def test_inputs_that_teach_nothing_are_an_error_to_handle(bad: Tensor) -> None:
    with pytest.raises(SingularHessian):
        quantize_gptq(torch.randn(4, 8), bad, parse_scheme("nf3-asym-g4"))


def test_nan_weights_and_wrong_options_are_errors() -> None:
    W, _, H = problem()
    W[3, 5] = torch.nan
    with pytest.raises(AfpqError, match="NaN"):
        quantize_gptq(W, H, parse_scheme("nf3-asym-g32"))
    with pytest.raises(AfpqError, match="order"):
        GptqOptions(order="random")
    with pytest.raises(AfpqError, match="damp"):
        GptqOptions(damp=0)


def test_one_sided_groups_survive_the_corrections() -> None:
    W, X, H = problem()
    W[0] = W[0].abs()
    W[1] = -W[1].abs()
    W[2] = 0
    solved, _ = quantize_gptq(W, H, parse_scheme("nf3-asym-g32"))
    assert torch.isfinite(solved.dequantize()).all()
    assert output_error(solved.dequantize()[:2], W[:2], X) < 0.05
    assert (solved.dequantize()[2] == 0).all()


def test_the_correction_aims_at_the_float_outputs() -> None:
    W, X, _ = problem()
    F = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1)) * X.std(0)
    corrected = toward_float_outputs(W, X.T @ X, X.T @ (F - X), 1e-6)

    def miss(Q: Tensor) -> float:
        return (X.double() @ Q.double().T - F.double() @ W.double().T).square().sum().item()

    best = torch.linalg.lstsq(X.double(), F.double() @ W.double().T).solution.T
    assert miss(corrected) < miss(W)
    assert miss(corrected) == pytest.approx(miss(best), rel=1e-3)
