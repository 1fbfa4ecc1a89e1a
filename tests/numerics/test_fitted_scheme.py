# SPDX-License-Identifier: MIT
"""What is not settled cannot be a fitted scheme, so nothing can be computed in the wrong order."""

from __future__ import annotations

import pytest
import torch

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.formats import LEARNED, parse_format
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.packing import to_tensors
from afpq.numerics.scale_storage import SCALE_STORAGES, ScaleGrid
from afpq.numerics.scales import fit_grid, fit_scales
from afpq.numerics.scheme import Scheme, parse_scheme

GRID = ScaleGrid(-4.0, 0.05)


@pytest.mark.parametrize("name", SCALE_STORAGES)
def test_a_grid_is_there_exactly_if_the_storage_needs_one(name: str) -> None:
    scheme = Scheme(parse_format("nf4"), 32, scale_dtype=name)
    right, wrong = (GRID, None) if SCALE_STORAGES[name].needs_grid else (None, GRID)
    assert FittedScheme(scheme, right).grid == right
    with pytest.raises(AfpqError, match="grid"):
        FittedScheme(scheme, wrong)


@pytest.mark.parametrize("format", LEARNED.values(), ids=str)
def test_a_codebook_that_is_to_be_learned_is_none_yet(format: object) -> None:
    with pytest.raises(AfpqError, match="not learned yet"):
        FittedScheme(parse_scheme(f"{format}-asym-g32"))
    with pytest.raises(AfpqError, match="not learned yet"):
        FittedScheme(parse_scheme("nf4-asym-g32")).with_format(parse_format(str(format)))


@pytest.mark.parametrize("text", ["nf4-asym-g32", "nf3-sym-g-1-float32", "int4-asym-g7", "int8-sym-g32"])
def test_it_answers_as_its_scheme(text: str) -> None:
    scheme = parse_scheme(text)
    fitted = FittedScheme(scheme)
    for name in ("format", "storage", "two_scales", "zero_point"):
        assert getattr(fitted, name) == getattr(scheme, name)
    assert (fitted.span(100), fitted.groups(100)) == (scheme.span(100), scheme.groups(100))


def test_a_change_keeps_the_rest() -> None:
    fitted = FittedScheme(parse_scheme("nf4-sym-g32-log8"), GRID)
    assert fitted.with_group_size(-1) == FittedScheme(parse_scheme("nf4-sym-g-1-log8"), GRID)
    assert fitted.with_format(parse_format("nf3")) == FittedScheme(parse_scheme("nf3-sym-g32-log8"), GRID)


def test_grids_tell_fitted_schemes_apart_but_not_schemes() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scheme = parse_scheme("nf4-sym-g32-log8")
    one, other = fit_grid(weight, scheme), fit_grid(2 * weight, scheme)
    assert one != other and one.scheme == other.scheme == scheme


def test_a_weight_whose_scales_have_lost_their_grid_is_not_saved() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    scheme = parse_scheme("nf4-sym-g32-log8")
    plain = fit_scales(weight, FittedScheme(parse_scheme("nf4-sym-g32-float32")))
    lost = QuantizedWeight(encode(weight, plain, scheme), plain, scheme)
    with pytest.raises(AfpqError, match="grid"):
        to_tensors(lost)
    with pytest.raises(AfpqError, match="grid"):
        _ = lost.fitted
