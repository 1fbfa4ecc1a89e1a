# SPDX-License-Identifier: MIT
"""Hidden states in a file: every window is read once, and a file of another size is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from afpq.calibration.hidden_states import BLOCK_BATCH_TOKENS, Activations, batch_size
from afpq.errors import AfpqError

CPU = torch.device("cpu")


def test_batches_divide_the_windows() -> None:
    for windows in (1, 7, 12, 128):
        for length in (5, 512, 2048, 10_000):
            size = batch_size(windows, length)
            assert windows % size == 0 and (size == 1 or size * length <= 4096)


@given(windows=st.integers(1, 30), length=st.sampled_from([1, 500, 1500, 5000]))
def test_batches_hold_every_window_once_and_a_sample_is_spread(windows: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        states = Activations(Path(place) / "states", (windows, length, 1), create=True)
        states.tensor[:] = torch.arange(float(windows))[:, None, None]
        batches = list(states.batches(CPU))
        assert all(torch.equal(hidden, states.tensor[rows]) for rows, hidden in batches)
        assert torch.equal(torch.cat([hidden for _, hidden in batches]), states.tensor)
        assert len({hidden.shape for _, hidden in batches}) == 1
        assert all(len(hidden) == 1 or hidden.shape[0] * length <= BLOCK_BATCH_TOKENS for _, hidden in batches)
        sample = states.sample(CPU)[:, 0, 0].tolist()
        assert len(sample) == len(set(sample)) == batch_size(windows, length)
        assert sample[0] == 0 and (len(sample) == 1 or sample[-1] == windows - 1)


def test_what_is_written_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    states = Activations(tmp_path / "states", (2, 3, 4), create=True)
    assert not states.tensor.any() and (tmp_path / "states").stat().st_size == 4 * 24
    states.tensor[1] = 7
    again = Activations(tmp_path / "states", (2, 3, 4), create=False)
    assert torch.equal(again.tensor, states.tensor) and again.tensor[1].eq(7).all()


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 4)])
def test_a_file_that_is_missing_or_of_another_size_is_an_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(AfpqError, match="states: missing"):
        Activations(tmp_path / "states", shape, create=False)
    Activations(tmp_path / "states", (2, 3, 4), create=True)
    with pytest.raises(AfpqError, match="another size; start again with --no-resume"):
        Activations(tmp_path / "states", shape, create=False)
