# SPDX-License-Identifier: MIT
"""A part of a tensor is what slicing gives, and the parts of fused experts make up the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from afpq.model.tensor_part import TensorPart


@given(
    expert=st.none() | st.integers(0, 2),
    transposed=st.booleans(),
    rows=st.none() | st.tuples(st.integers(0, 4), st.integers(4, 8), st.integers(1, 3)),
)
def test_a_part_is_a_view_of_rows_of_an_expert(
    expert: int | None, transposed: bool, rows: tuple[int, int, int] | None
) -> None:
    """By element: row i of the part is row start + i * step of the matrix [out, in], however it is stored."""
    matrices = torch.arange(3 * 8 * 5).view(3, 8, 5)  # [experts, out, in]
    stored = matrices.mT.contiguous() if transposed else matrices
    source = stored if expert is not None else stored[1]
    part = TensorPart("fused", expert, rows, transposed)
    found = part.of(source)
    start, stop, step = rows or (0, 8, 1)
    wanted = range(start, stop, step)
    assert found.shape == (len(wanted), 5)
    for position, row in enumerate(wanted):
        assert torch.equal(found[position], matrices[1 if expert is None else expert, row])
    assert found.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
    assert part.whole is (expert is None and rows is None)


@pytest.mark.parametrize("split", [[(0, 4, 1), (4, 8, 1)], [(0, 8, 2), (1, 8, 2)]], ids=["halves", "in turn"])
def test_a_bias_has_the_same_rows_as_its_matrix(split: list[tuple[int, int, int]]) -> None:
    """Transposing concerns matrices: the rows of a bias are taken as they are."""
    bias: Tensor = torch.arange(16).view(2, 8)
    parts = [TensorPart("bias", 1, rows, transposed=True).of(bias) for rows in split]
    assert sorted(torch.cat(parts).tolist()) == bias[1].tolist()
    assert parts[0].tolist() == bias[1][slice(*split[0])].tolist()


def test_another_shape_shows_when_the_part_is_taken() -> None:
    with pytest.raises(IndexError):
        TensorPart("fused", 7).of(torch.empty(3, 8, 5))
