# SPDX-License-Identifier: MIT
"""Names that a wrapper of the model left in a checkpoint are read as if they were not there, or explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_line import TEXT, Cli, assert_refused
from command_line import cli as cli  # the fixture
from conftest import edit_weights
from safetensors.torch import load_file
from small_models import model_of, plan_of

from afpq import AfpqError, CalibrationSettings, quantize
from afpq.checkpoint.reader import WEIGHTS
from afpq.checkpoint.wrappers import unwrapped_name, wrapper_of
from afpq.evaluation.loading import load_model

PREFIXES = ("_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.")
IDS = torch.arange(0, 240, 5).view(2, 24)


def prefix_names(directory: Path, prefix: str, inside: str = "") -> None:
    """Put `prefix` before all names, and `inside` behind the number of each block."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            parts = name.split(".")
            place = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 0)
            wrapped = ".".join([*parts[:place], *([inside] if inside and place else []), *parts[place:]])
            tensors[prefix + wrapped] = tensors.pop(name)

    edit_weights(directory, change)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_result_is_that_of_the_plain_names(
    cli: Cli, tiny_model_dir: Path, tiny_copy: Path, tmp_path: Path, prefix: str
) -> None:
    prefix_names(tiny_copy, prefix)
    result = cli("quantize", tiny_copy, tmp_path / "out")
    assert result.code == 0 and f"without {prefix!r}" in result.err
    quantize(tiny_model_dir, tmp_path / "plain")
    found, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_wrapped_blocks_too(tiny_model_dir: Path, tiny_copy: Path) -> None:
    prefix_names(tiny_copy, "", inside="_orig_mod")
    assert plan_of(tiny_copy).outputs() == plan_of(tiny_model_dir).outputs()


def test_the_original_is_loaded_for_the_card_calibration_and_the_end_pass(tiny_copy: Path, tmp_path: Path) -> None:
    plain = load_model(tiny_copy, device="cpu")(IDS).logits
    prefix_names(tiny_copy, "_orig_mod.")
    assert torch.equal(load_model(tiny_copy, device="cpu")(IDS).logits, plain)
    settings = CalibrationSettings(samples=4, seq_len=32)
    outcome = quantize(
        tiny_copy, tmp_path / "out", "nf3-asym-g64", method="gptq", text=TEXT, settings=settings, end_pass=2
    )
    assert not isinstance(outcome.measured, str) and outcome.end_pass is not None


def test_experts_in_one_tensor_are_read_in_parts(tmp_path: Path) -> None:
    model_of("gpt_oss", head_dim=8, num_local_experts=4).save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "wrapped")
    prefix_names(tmp_path / "wrapped", "module.")
    quantize(tmp_path / "model", tmp_path / "a", "nf4-asym-g8")
    quantize(tmp_path / "wrapped", tmp_path / "b", "nf4-asym-g8")
    found, expected = load_file(tmp_path / "b" / WEIGHTS), load_file(tmp_path / "a" / WEIGHTS)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_stays_incomplete_names_the_tensor_and_the_wrapper(tiny_copy: Path) -> None:
    prefix_names(tiny_copy, "module.")
    edit_weights(tiny_copy, lambda t: t.pop("module.model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(AfpqError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        plan_of(tiny_copy)


def test_other_names_are_shown_and_skip_is_not_blamed(cli: Cli, tiny_copy: Path, tmp_path: Path) -> None:
    prefix_names(tiny_copy, "student.")
    result = cli("quantize", tiny_copy, tmp_path / "out")
    assert_refused(result, "lacks model.layers.0.self_attn.q_proj.weight (14 linears in all)", "student.")
    assert "--skip" not in result.err


def test_an_adapter_that_is_not_merged_is_named(tiny_copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "q_proj" in name]:
            tensors[name.replace("q_proj", "q_proj.base_layer")] = tensors.pop(name)
            tensors[name.replace("q_proj", "q_proj.lora_A.default")] = torch.zeros(4, 64)

    edit_weights(tiny_copy, change)
    prefix_names(tiny_copy, "base_model.model.")
    with pytest.raises(AfpqError, match=r"adapter that is not merged.*merge_and_unload"):
        plan_of(tiny_copy)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "modules.a.weight", "a.module.weight"])
def test_plain_names_stay(name: str) -> None:
    assert (wrapper_of(name), unwrapped_name(name)) == ("", name)


def test_what_a_wrapper_put_into_a_name() -> None:
    assert wrapper_of("module._orig_mod.a.weight") == "module._orig_mod."
    assert unwrapped_name("module.layers.0._orig_mod.a.weight") == "layers.0.a.weight"
