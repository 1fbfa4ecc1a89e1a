# SPDX-License-Identifier: MIT
"""Descent never raises the loss, keeps what it must keep, and finds the optimum where that is known."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problem import problem
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.algorithms.coordinate_descent import descend
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import parse_scheme

SCHEMES = st.sampled_from(
    ["nf3-asym-g16", "nf4-sym-g7", "int3-asym-g16", "nf2-asym-g-1-log8", "fp3-sym-g16-float32", "int4-sym-g16-log8"]
)


def damped(H: Tensor) -> Tensor:
    return H + 0.01 * H.diagonal().mean() * torch.eye(len(H))


def loss(weight: QuantizedWeight, W: Tensor, H: Tensor) -> Tensor:
    """Of each row, in float64."""
    E = (weight.dequantize() - W).double()
    return ((E @ H.double()) * E).sum(1)


@settings(max_examples=30, deadline=None)
@given(SCHEMES, st.sampled_from(["absmax", "mse"]), st.integers(1, 9), st.integers(1, 50), st.integers(0, 999))
def test_no_row_is_worse_after_any_sweep(text: str, search: str, rows: int, columns: int, seed: int) -> None:
    W, _, H = problem(rows, columns, 80, seed)
    H = damped(H)
    start = quantize_rtn(W, parse_scheme(text), search)
    losses = [loss(start, W, H)]
    weight = start
    for _ in range(3):
        weight = descend(W, H, weight, 1)
        weight.validate()
        assert weight.fitted == start.fitted
        losses.append(loss(weight, W, H))
    rounding = 1e-6 * ((W.double() @ H.double()) * W).sum(1) + 1e-12  # of gradients, which are kept in float32
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4) + rounding).all())


@pytest.mark.parametrize("text", ["nf3-asym-g32", "nf4-sym-g32-log8", "int3-asym-g32"])
def test_correlated_inputs_gain(text: str) -> None:
    W, _, H = problem()
    start = quantize_rtn(W, parse_scheme(text), "mse")
    codes, pos = start.codes.clone(), start.scales.pos.clone()
    found = descend(W, damped(H), start, 3)
    assert loss(found, W, damped(H)).sum() < 0.6 * loss(start, W, damped(H)).sum()
    assert torch.equal(start.codes, codes) and torch.equal(start.scales.pos, pos)  # what was given is not touched


def test_two_sweeps_are_one_after_the_other() -> None:
    W, _, H = problem(8, 48)
    start = quantize_rtn(W, parse_scheme("nf3-asym-g16-float32"), "mse")
    twice, again = descend(W, damped(H), start, 2), descend(W, damped(H), descend(W, damped(H), start, 1), 1)
    assert torch.equal(twice.codes, again.codes)
    torch.testing.assert_close(twice.scales.pos, again.scales.pos, rtol=1e-4, atol=0)


def test_no_single_code_can_be_improved_in_the_end() -> None:
    """By brute force: after many sweeps, changing one code of a row never lowers its loss by much."""
    W, _, H = problem(4, 12, 60)
    H = damped(H)
    scheme = parse_scheme("nf2-sym-g-1-float32")
    found = descend(W, H, quantize_rtn(W, scheme, "mse"), 30)
    least = loss(found, W, H)
    for column, code in product(range(12), range(4)):
        codes = found.codes.clone()
        codes[:, column] = code
        changed = loss(QuantizedWeight(codes, found.scales, scheme), W, H)
        assert bool((changed >= least * (1 - 1e-5)).all())


def test_without_correlations_codes_of_nearest_stay() -> None:
    W, _, _ = problem(8, 32)
    start = quantize_rtn(W, parse_scheme("nf3-asym-g32-float32"), "mse")
    found = descend(W, torch.eye(32), start, 1)
    nearest = (start.dequantize() - W).square().sum()
    assert (found.dequantize() - W).square().sum() <= nearest * (1 + 1e-6)
    assert (found.codes == start.codes).float().mean() > 0.9
