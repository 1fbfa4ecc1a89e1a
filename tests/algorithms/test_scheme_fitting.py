# SPDX-License-Identifier: MIT
"""Any scheme is settled for a weight in one call: codebook and grid, or nothing where nothing is to be settled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afpq.algorithms import fit_scheme, quantize_gptq, quantize_rtn
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.scales import fit_grid
from afpq.numerics.scheme import parse_scheme


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("text", ["nf3-asym-g32", "nf4-sym-g16-log8", "learned3-asym-g32", "learned2-sym-g32-log8"])
def test_everything_is_settled(text: str, search: str) -> None:
    scheme, weight = parse_scheme(text), random(16, 64)
    fitted = fit_scheme(weight, scheme, search)
    assert not fitted.format.learned and (fitted.grid is not None) == text.endswith("log8")
    assert replace(fitted.scheme, format=scheme.format) == scheme
    if scheme.format.learned:
        assert fitted.format != scheme.format.start  # something better was found
    assert fitted.grid == fit_grid(weight, replace(scheme, format=scheme.format.start)).grid


@pytest.mark.parametrize("text", ["nf4-sym-g16-log8", "learned2-sym-g32-log8"])
def test_what_is_fitted_stays_for_another_weight(text: str) -> None:
    """As for the parts of a weight, which have codebook and grid in common."""
    fitted = fit_scheme(random(16, 64), parse_scheme(text))
    other, x = 100 * random(4, 64, seed=1), random(256, 64, seed=2)
    assert fit_scheme(other, fitted) is fitted
    assert quantize_rtn(other, fitted, "mse").fitted == fitted
    assert quantize_gptq(other, x.T @ x, fitted)[0].fitted == fitted


def test_importance_counts_for_the_codebook() -> None:
    weight, scheme = random(32, 64), parse_scheme("learned3-asym-g32")
    importance = torch.ones(64)
    importance[32:] = 0
    assert fit_scheme(weight, scheme, "mse", importance).format != fit_scheme(weight, scheme, "mse").format


def test_an_unknown_search_and_nan_are_errors() -> None:
    weight = random(4, 32)
    with pytest.raises(AfpqError, match="'best'"):
        fit_scheme(weight, parse_scheme("learned3-asym-g32"), "best")
    weight[1, 2] = torch.nan
    for text in ("learned3-asym-g32", "nf3-asym-g32-log8"):
        with pytest.raises(AfpqError, match="NaN"):
            fit_scheme(weight, parse_scheme(text))


def test_a_plain_scheme_is_only_wrapped() -> None:
    scheme = parse_scheme("nf3-asym-g32")
    assert fit_scheme(random(4, 32), scheme) == FittedScheme(scheme)
