# SPDX-License-Identifier: MIT
"""Scales of parts join to those of the whole, whatever sides, zero points and grid they have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from afpq.numerics.group_scales import GroupScales
from afpq.numerics.scale_storage import ScaleGrid
from afpq.numerics.scales import fit_grid, fit_scales
from afpq.numerics.scheme import parse_scheme

KINDS = ["nf3-asym-g8", "nf3-sym-g8", "int4-asym-g8", "nf4-asym-g8-log8"]


def fitted(text: str) -> GroupScales:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    return fit_scales(weight, fit_grid(weight, parse_scheme(text)))


def assert_same(one: GroupScales, other: GroupScales) -> None:
    assert torch.equal(one.pos, other.pos) and torch.equal(one.neg, other.neg)
    assert (one.neg is one.pos) == (other.neg is other.pos) and one.grid == other.grid
    assert (one.zero is None) == (other.zero is None)
    if one.zero is not None and other.zero is not None:
        assert torch.equal(one.zero, other.zero)


@pytest.mark.parametrize("text", KINDS)
def test_cat_undoes_slicing_rows_and_groups(text: str) -> None:
    scales = fitted(text)
    assert_same(GroupScales.cat([scales[:1], scales[1:4], scales[4:]]), scales)
    assert_same(GroupScales.cat([scales[:, :3], scales[:, 3:]], 1), scales)


@pytest.mark.parametrize("text", KINDS)
def test_stack_undoes_taking_groups_one_by_one(text: str) -> None:
    scales = fitted(text)
    assert_same(GroupScales.stack([scales[:, group] for group in range(5)], 1), scales)


@pytest.mark.parametrize("text", KINDS)
def test_map_changes_each_side_once(text: str) -> None:
    scales, calls = fitted(text), []

    def double(side: Tensor) -> Tensor:
        calls.append(side)
        return 2 * side

    found = scales.map(double)
    assert len(calls) == (1 if scales.neg is scales.pos else 2)
    assert_same(found, replace(scales, pos=found.pos, neg=found.neg))
    assert torch.equal(found.pos, 2 * scales.pos) and torch.equal(found.neg, 2 * scales.neg)
    assert scales.float().pos.dtype == torch.float32


def test_parts_with_one_side_and_with_two_join_to_two() -> None:
    scales = fitted("nf3-asym-g8")
    one = GroupScales(scales.pos, scales.pos)
    joined = GroupScales.cat([scales, one])
    assert torch.equal(joined.neg, torch.cat([scales.neg, scales.pos]))


def test_parts_of_different_weights_do_not_join() -> None:
    scales, points = fitted("nf3-sym-g8"), fitted("int4-asym-g8")
    with pytest.raises(ValueError, match="zero points"):
        GroupScales.cat([scales, points])
    with pytest.raises(ValueError, match="grid"):
        GroupScales.stack([replace(scales, grid=ScaleGrid(0.0, step)) for step in (0.1, 0.2)])
