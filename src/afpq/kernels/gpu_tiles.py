# SPDX-License-Identifier: MIT
"""Tiles of the GPU kernel, as data: by compute capability and number of tokens.

Chosen by the compiled code (`bench/gpu_code.py`: instructions for each weight, registers, shared memory), not by time:
they have not been run on these GPUs yet. `AFPQ_AUTOTUNE=1` measures on the present machine instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

MOST_TOKENS = 256  # for more, decoded panels go to the matrix product of torch


@dataclass(frozen=True)
class Tile:
    """A program takes `rows` of the weight, `tokens`, and `columns` at a time; `fold`: see `triton_kernels.py`.

    Rows are split among programs until there are `programs` for each multiprocessor.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    fold: bool = False
    programs: int = 2

    def within(self, group: int) -> Tile:
        """Return the tile whose columns cross no borders of groups of this size, a multiple of 32 (0: one group)."""
        columns = self.columns
        while group % columns:
            columns //= 2
        return replace(self, columns=columns)


# Most tokens -> tile. Hopper multiplies out of shared memory; before it, operands take registers. Consumer GPUs have
# 99 KiB of shared memory a program.
_HOPPER = {
    16: Tile(128, 16, 128, 4, 3),
    32: Tile(128, 32, 128, 8, 3),
    64: Tile(128, 64, 128, 8, 3),
    256: Tile(128, 128, 128, 8, 3, fold=True, programs=1),
}
_AMPERE = {
    16: Tile(128, 16, 128, 4, 3),
    32: Tile(128, 32, 128, 8, 3),
    64: Tile(128, 64, 64, 8, 3),
    256: Tile(128, 128, 64, 8, 3, fold=True, programs=1),
}
_SMALL = {
    16: Tile(64, 16, 128, 4, 3),
    32: Tile(64, 32, 128, 4, 3),
    64: Tile(128, 64, 64, 8, 3),
    256: Tile(128, 128, 64, 8, 3, fold=True, programs=1),
}
TILES: dict[tuple[int, int], dict[int, Tile]] = {(8, 0): _AMPERE, (9, 0): _HOPPER, (10, 0): _HOPPER}


def bucket(tokens: int) -> int:
    """Return the key of `TILES` for so many tokens, at most MOST_TOKENS."""
    return next(most for most in _SMALL if tokens <= most)


def tile_for(capability: tuple[int, int], tokens: int) -> Tile:
    """Return the table's tile for a GPU of this compute capability and so many tokens, at most MOST_TOKENS."""
    return TILES.get(capability, _SMALL)[bucket(tokens)]


def steps_of_a_program(tiles: int, steps: int, programs: int, multiprocessors: int) -> int:
    """Return how many steps along the columns a program takes, so that the busiest multiprocessor has least to do.

    `tiles` of the result are shared out, with about `programs` for each multiprocessor or more, to hide latencies;
    starting and ending one costs about as much as a step.
    """
    fewest = min(-(-3 * programs * multiprocessors // (4 * tiles)), steps)
    best = steps, 0.0
    for splits in range(fewest, min(max(8, 2 * fewest), steps) + 1):
        each = -(-steps // splits)
        busiest = -(-tiles * -(-steps // each) // multiprocessors) * (each + 1)
        if not best[1] or busiest < best[1]:
            best = each, busiest
    return best[0]


def candidates(capability: tuple[int, int], tokens: int) -> list[Tile]:
    """Return the tiles that autotuning tries: the table's choice first, then its neighbours."""
    tile = tile_for(capability, tokens)
    tiles = [tile]
    for rows, warps in ((64, 4), (128, 4), (128, 8)):
        for stages in (2, 3, 4):
            for programs in (1, 2, 4):
                tiles.append(replace(tile, rows=rows, warps=warps, stages=stages, programs=programs))
    return list(dict.fromkeys(tiles))


def fastest(tiles: list[Tile], seconds: Callable[[Tile], float | None]) -> Tile:
    """Return the tile that takes the least time; `seconds` returns None for one that cannot run. Ties: the first."""
    times = [(taken, tile) for tile in tiles if (taken := seconds(tile)) is not None]
    return min(times, key=lambda pair: pair[0])[1] if times else tiles[0]
