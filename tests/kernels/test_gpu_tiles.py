# SPDX-License-Identifier: MIT
"""Tiles share the work of a product out evenly, and every GPU has some."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.kernels.gpu_tiles import MOST_TOKENS, TILES, bucket, candidates, fastest, steps_of_a_program, tile_for


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 4), st.integers(1, 200))
def test_steps_are_shared_out_evenly(tiles: int, steps: int, programs: int, multiprocessors: int) -> None:
    each = steps_of_a_program(tiles, steps, programs, multiprocessors)
    assert 1 <= each <= steps
    splits = -(-steps // each)
    assert (splits - 1) * each < steps <= splits * each  # no program without work


@pytest.mark.parametrize(("rows", "columns"), [(8192, 8192), (28672, 8192), (4096, 14336), (4096, 11008)])
def test_large_layers_keep_an_h200_busy(rows: int, columns: int) -> None:
    tiles, steps = rows // 128, columns // 128
    each = steps_of_a_program(tiles, steps, 2, 132)
    assert tiles * steps / (-(-tiles * -(-steps // each) // 132) * each * 132) > 0.94


def test_tiles_of_unknown_gpus_are_the_small_ones() -> None:
    assert tile_for((12, 0), 1) == tile_for((8, 6), 1) != TILES[9, 0][16]


@given(st.sampled_from([*TILES, (8, 6), (12, 0)]), st.integers(1, MOST_TOKENS))
def test_a_tile_of_the_table_has_room_for_the_tokens_of_its_bucket(capability: tuple[int, int], tokens: int) -> None:
    most, tile = bucket(tokens), tile_for(capability, tokens)
    assert tokens <= most <= MOST_TOKENS and tile == tile_for(capability, most)
    assert tile.tokens in (most, 128)
    assert candidates(capability, tokens)[0] == tile


@given(st.sampled_from(sorted(TILES)), st.integers(1, 40))
def test_columns_of_a_tile_do_not_cross_groups(capability: tuple[int, int], units: int) -> None:
    tile = tile_for(capability, 1)
    within = tile.within(32 * units)
    assert (32 * units) % within.columns == 0 and within.columns >= 32
    assert tile.within(0) == tile  # one group


def test_the_fastest_tile_is_the_first_of_the_least_time() -> None:
    tiles = candidates((9, 0), 1)[:4]
    times = dict(zip(tiles, (None, 3.0, 2.0, 2.0)))
    assert fastest(tiles, times.get) == tiles[2]
    assert fastest(tiles, lambda tile: None) == tiles[0]
