# SPDX-License-Identifier: MIT
"""A plan's figures, known before anything is written: units, outputs, true bits, coverage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import edit_weights
from safetensors.torch import load_file
from small_models import plan_of

from afpq import parse_scheme, quantize
from afpq.checkpoint.plan import OUTSIDE
from afpq.checkpoint.reader import WEIGHTS

BLOCK_WEIGHTS = 2 * (64 * 64 + 32 * 64) + 3 * 64 * 96  # of the tiny model


def test_units_are_the_outside_and_then_the_blocks(tiny_model_dir: Path) -> None:
    plan = plan_of(tiny_model_dir)
    assert [unit.name for unit in plan.units] == [OUTSIDE, "model.layers.0", "model.layers.1"]
    assert set(plan.units[0].tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(name.startswith("model.layers.1.") for name in plan.units[2].tensors)
    assert plan.units[0].targets == []


def test_every_tensor_is_in_one_unit(tiny_model_dir: Path) -> None:
    plan = plan_of(tiny_model_dir)
    members = [name for unit in plan.units for name in unit.tensors]
    assert sorted(members) == sorted(load_file(tiny_model_dir / WEIGHTS))


@pytest.mark.parametrize(
    "scheme", ["nf4-asym-g64", "nf3-sym-g128", "int3-asym-g64", "int4-asym-g-1", "nf2-asym-g32-float32", "int8-sym-g64"]
)
def test_outputs_are_what_is_written(tiny_model_dir: Path, tmp_path: Path, scheme: str) -> None:
    recipe = {
        "skip": ("layers.0.*q_proj",),
        "overrides": (("down_proj", parse_scheme("fp3-sym-g32")),),
    }
    plan = plan_of(tiny_model_dir, scheme, **recipe)
    quantize(tiny_model_dir, tmp_path / "out", scheme, **recipe)  # type: ignore[arg-type]
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in written.items()} == plan.outputs()
    assert sum(t.nbytes for t in written.values()) == plan.output_bytes
    assert plan.input_bytes == sum(t.nbytes for t in load_file(tiny_model_dir / WEIGHTS).values())
    assert plan.kept == ("lm_head", "model.layers.0.self_attn.q_proj")


def test_bits_of_a_ragged_scheme_by_hand(tiny_model_dir: Path) -> None:
    # nf3, groups of 64, two float16 scales: 24 bytes of codes for 64 weights, 36 for 96.
    # Rows of 64 have one group; the rows of down_proj, 96 long, have two, the second with 32 weights.
    rows_of_64 = 64 + 32 + 32 + 64 + 96 + 96
    stored = rows_of_64 * (24 + 2 * 2) + 64 * (36 + 2 * 2 * 2)
    plan = plan_of(tiny_model_dir, "nf3-asym-g64")
    assert plan.bits_per_weight == pytest.approx(8 * stored / BLOCK_WEIGHTS, rel=1e-12)
    assert plan.coverage == 1


def test_bits_of_zero_points_by_hand(tiny_model_dir: Path) -> None:
    # int4, one group a row: half a byte a weight, a float16 scale, and half a byte of zero point for each row.
    rows = 64 + 32 + 32 + 64 + 96 + 96 + 64
    stored = BLOCK_WEIGHTS / 2 + 2 * rows + rows / 2
    assert plan_of(tiny_model_dir, "int4-asym-g-1").bits_per_weight == pytest.approx(8 * stored / BLOCK_WEIGHTS)


def test_coverage_by_hand(tiny_model_dir: Path) -> None:
    plan = plan_of(tiny_model_dir, skip=("mlp",))
    assert plan.coverage == pytest.approx(2 * (64 * 64 + 32 * 64) / BLOCK_WEIGHTS)
    assert len(plan.targets) == 8


def test_an_unknown_tensor_inside_a_block_counts_as_not_covered(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(BLOCK_WEIGHTS, 2)}))
    plan = plan_of(tiny_copy)
    assert "model.layers.0.extra.weight" in plan.units[1].tensors
    assert plan.coverage == pytest.approx(0.5)
