# SPDX-License-Identifier: MIT
"""A pattern that matches nothing is an error that names it and the nearest name, however it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture
from hypothesis import given
from hypothesis import strategies as st
from small_models import llama, plan_of
from transformers import AutoModel, AutoModelForCausalLM

from afpq import AfpqConfig, AfpqError, Recipe, parse_scheme
from afpq.model.patterns import check_entries, check_patterns, other_modules
from afpq.model.quantize_in_memory import quantize_model
from afpq.recipe import exactly

NF4 = parse_scheme("nf4-asym-g64")
LINEARS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]
TENSORS = [f"{name}.weight" for name in (*LINEARS, "lm_head", "model.embed_tokens", "model.layers.0.input_layernorm")]


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.1\.", "lm_head", "embed", "layernorm$", exactly(LINEARS[0])])
def test_a_skip_may_name_a_linear_or_what_is_left_anyway(pattern: str) -> None:
    check_patterns(Recipe(NF4, skip=(pattern,)), LINEARS, TENSORS)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("self_attention", "did you mean self_attn?"),
        ("dwon_proj", "did you mean down_proj?"),
        (r"model\.layer\.0", "did you mean"),
        (r"layers\.1$", ""),  # the block has no weight of its own, and its linears do not end so
        ("down_proj.weight", "down_proj"),
        ("zzz", "names such as model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_name(pattern: str, near: str) -> None:
    for recipe in (Recipe(NF4, skip=("q_proj", pattern)), Recipe(NF4, overrides=(("q_proj", NF4), (pattern, NF4)))):
        with pytest.raises(AfpqError) as error:
            check_patterns(recipe, LINEARS, TENSORS)
        assert repr(pattern) in str(error.value) and near in str(error.value)


def test_an_override_of_an_end_names_the_option_for_it() -> None:
    with pytest.raises(AfpqError, match=r"'lm_head'.*--lm-head nf4-asym-g64"):
        check_patterns(Recipe(NF4, overrides=(("lm_head", NF4),)), LINEARS, TENSORS)


@given(st.sampled_from(LINEARS), st.data())
def test_every_part_of_a_name_is_accepted(name: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(name) - 1))
    part = name[start : data.draw(st.integers(start + 1, len(name)))].replace(".", r"\.")
    check_patterns(Recipe(NF4, skip=(part,), overrides=((part, NF4), (exactly(name), NF4))), LINEARS, TENSORS)


def test_entries_of_modules_to_not_convert() -> None:
    check_entries(["lm_head", "model.layers.0", "q_proj", r".*mlp.*", "embed_tokens"], LINEARS, TENSORS)
    check_entries(["lm_head"], LINEARS, [f"{name}.weight" for name in LINEARS])  # a model without a head
    with pytest.raises(AfpqError, match=r"modules_to_not_convert: 'qproj'.*did you mean q_proj"):
        check_entries(["lm_head", "qproj"], LINEARS, TENSORS)


def test_other_modules_are_those_with_tensors_that_are_no_linears() -> None:
    assert other_modules(LINEARS, TENSORS) == ["lm_head", "model.embed_tokens", "model.layers.0.input_layernorm"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--skip", "self_attention"], "self_attention"),
        (["--override", "dwon_proj=nf4-asym-g32"], "dwon_proj"),
        (["--skip", "q_proj", "--skip", "query"], "query"),
    ],
    ids=" ".join,
)
def test_the_command_refuses_it_also_in_a_dry_run(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, words: list[str], named: str
) -> None:
    for more in ((), ("--dry-run",)):
        assert_refused(cli("quantize", tiny_model_dir, tmp_path / "out", *words, *more), repr(named))
    assert list(tmp_path.iterdir()) == []
    assert cli("quantize", tiny_model_dir, tmp_path / "out", "--skip", "lm_head", "--dry-run").code == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"modules_to_not_convert": ["lm_head", "qproj"]},
        {"dynamic": {"-:qproj": {}}},
        {"dynamic": {"+:qproj": {"bits": 3}}},
    ],
    ids=str,
)
def test_loading_with_such_a_config_is_an_error(tiny_model_dir: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(AfpqError, match=r"'qproj'.*did you mean q_proj"):
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=AfpqConfig(**keys))


def test_names_as_the_checkpoint_has_them_match_in_a_model_without_its_head(tiny_model_dir: Path) -> None:
    keys: dict[str, Any] = {
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"],
        "dynamic": {"-:model.*q_proj": {}},
    }
    model = AutoModel.from_pretrained(tiny_model_dir, quantization_config=AfpqConfig(**keys))
    assert type(model.layers[1].self_attn.q_proj).__name__ == "Linear"


def test_plans_and_models_in_memory_check_too(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="'qproj'"):
        plan_of(tiny_model_dir, skip=("qproj",))
    with pytest.raises(AfpqError, match="'qproj'"):
        quantize_model(llama(tied=True), Recipe(NF4, skip=("qproj",)))
