# SPDX-License-Identifier: MIT
"""The embedding and the head that stay: their share of the weights, and what an option for them saves."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli
from command_line import cli as cli  # the fixture
from conftest import ModelMaker
from small_models import t5

from afpq import Recipe, parse_scheme
from afpq.jobs.left_ends import left_ends
from afpq.jobs.prepare import prepare

NF4 = parse_scheme("nf4-asym-g64-log8")
TABLE, BLOCKS = 256 * 64, 2 * (2 * (64 * 64 + 32 * 64) + 3 * 64 * 96) + 5 * 64


def test_a_tied_table_is_named_once_with_what_its_option_saves(
    cli: Cli, make_model: ModelMaker, tmp_path: Path
) -> None:
    directory = make_model(tmp_path / "model", tie_word_embeddings=True)
    job = prepare(directory, Recipe(NF4))
    (end,) = left_ends(job.plan, job.model)
    assert end.share == pytest.approx(TABLE / (TABLE + BLOCKS))
    quantized = prepare(directory, Recipe(NF4, embedding=NF4)).plan
    assert end.saved == job.plan.output_bytes - quantized.output_bytes
    result = cli("quantize", directory, tmp_path / "out", "--dry-run")
    assert f"left as they were: {end.sentence()}\n" in result.out
    assert end.sentence().startswith("model.embed_tokens (and lm_head, tied to it): 21.0 % of the weights; --embedding")
    assert "left as they were: lm_head" not in result.out


def test_untied_ends_are_two(tiny_model_dir: Path) -> None:
    job = prepare(tiny_model_dir, Recipe(NF4))
    assert [end.option for end in left_ends(job.plan, job.model)] == ["--embedding", "--lm-head"]
    job = prepare(tiny_model_dir, Recipe(NF4, lm_head=NF4))
    assert [end.modules for end in left_ends(job.plan, job.model)] == [("model.embed_tokens",)]


def test_a_table_with_other_readers_has_no_option(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path / "t5")
    job = prepare(tmp_path / "t5", Recipe(NF4))
    (end,) = left_ends(job.plan, job.model)
    assert end.saved is None and "--embedding" not in end.sentence()


def test_small_ends_are_not_named(make_model: ModelMaker, tmp_path: Path) -> None:
    job = prepare(make_model(tmp_path / "model", vocab_size=40), Recipe(NF4))
    assert left_ends(job.plan, job.model) == []
