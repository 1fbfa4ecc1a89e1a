# SPDX-License-Identifier: MIT
"""The scripts that measure other tools: their bits, the inputs' moments, and the picture of all rows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def picture(bench: Any) -> ModuleType:
    module: ModuleType = bench("picture")
    return module


def row(
    picture: ModuleType, bits: float, kl: float, tool: str = "afpq", scheme: str = "nf3", method: str = "gptq"
) -> Any:
    return picture.Row(tool, scheme, method, bits, 52.0, kl, None, None)


@pytest.mark.parametrize(
    ("bits", "sym", "group", "expected"),
    [(3, True, 128, 3.125), (3, False, 128, 3.1484375), (4, True, 128, 4.125), (2, False, 64, 2.28125)],
)
def test_autorounds_bits_count_scales_and_zero_points(
    bench: Any, bits: int, sym: bool, group: int, expected: float
) -> None:
    assert bench("autoround").true_bits(bits, sym, group) == expected


def test_second_moments_are_the_mean_squares_of_inputs(bench: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner, self.head = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

        def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
            out: Tensor = self.head(self.inner(self.embedding(ids)))
            return out

    model, tokens = Model(), torch.arange(40).view(10, 4) % 8
    moments = bench("protocol").second_moments(model, tokens)
    assert moments.keys() == {"inner"}, "the head stays float"
    torch.testing.assert_close(moments["inner"], model.embedding(tokens).square().mean((0, 1)).detach())


def test_values_in_a_group_are_counted(bench: Any) -> None:
    weight = torch.tensor([[1.0, 1, 2, 2], [3, 4, 5, 5]])
    assert bench("protocol").most_values_in_a_group(weight, 4) == 3
    assert bench("protocol").most_values_in_a_group(weight, 2) == 2


def test_a_frontier_has_less_kl_with_every_bit(picture: ModuleType) -> None:
    points = [row(picture, 3.25, 8), row(picture, 3.125, 9), row(picture, 3.125, 10), row(picture, 4, 8.5)]
    assert [(p.bits, p.kl) for p in picture.frontier(points)] == [(3.125, 9), (3.25, 8)]


def test_a_row_just_measured_replaces_the_kept_one(picture: ModuleType, tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    values = {"scheme": "nf3-sym-g64-log8", "method": "gptq", "bits": 3.126, "perplexity": 52.27}
    old.write_text(json.dumps({"tool": "afpq", **values, "kl_divergence": 0.00922}) + "\n")
    new.write_text(json.dumps({**values, "kl_divergence": 0.0090, "top1_agreement": 0.92}) + "\n")
    (only,) = picture.read([old, new])
    assert (only.tool, only.kl, only.top1, only.error) == ("afpq", 9.0, 92.0, None)
    assert picture.table([only]).splitlines()[-1] == (
        "| 3.126 | **afpq** | nf3-sym-g64-log8 | gptq | 52.27 | 9.00 |  | 92.0 |"
    )


def test_the_kept_rows_make_a_picture(picture: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = picture.read(picture.KEPT)
    (low, high), (least, most) = picture.BITS, picture.KLS
    drawn = [row for row in rows if row.series in picture.STYLES]
    assert {row.series for row in rows} == {row.series for row in drawn}, "each tool has its style"
    best = [row for name in picture.STYLES for row in picture.frontier(row for row in drawn if row.series == name)]
    assert not [row for row in best if not (low < row.bits < high and least < row.kl < most)], "all are inside the axes"
    picture.draw(rows, tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size <= 200_000
