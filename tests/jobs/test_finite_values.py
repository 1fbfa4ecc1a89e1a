# SPDX-License-Identifier: MIT
"""NaN and Inf in what is not quantized: an error that names the tensor, before anything is made."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from bnb_layout import Layout, convert
from conftest import edit_weights, save_tied_qwen2
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

import afpq
from afpq import AfpqError
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.jobs.finite_values import check_kept, is_finite
from afpq.model.skeleton import build_skeleton
from afpq.recipe import Recipe

NORM, EMBEDDING, HEAD = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"


def spoil(directory: Path, name: str, value: float) -> None:
    edit_weights(directory, lambda tensors: tensors[name].view(-1)[-3].fill_(value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [NORM, EMBEDDING, HEAD, "model.norm.weight", "model.layers.0.mlp.down_proj.weight"])
def test_it_names_the_tensor_before_out_exists(tiny_copy: Path, tmp_path: Path, name: str, value: float) -> None:
    spoil(tiny_copy, name, value)
    with pytest.raises(AfpqError, match=rf"tensor {name} contains NaN or Inf; repair it"):
        afpq.quantize(tiny_copy, tmp_path / "out", skip=("down_proj",))
    assert not list(tmp_path.glob("out*"))


def test_calibrated_methods_and_budgets_name_it_before_they_run(tiny_copy: Path, tmp_path: Path) -> None:
    spoil(tiny_copy, "model.norm.weight", math.nan)
    settings = afpq.CalibrationSettings(samples=2, seq_len=16)
    for options in ({"method": "gptq"}, {"method": "tune"}, {"bits_per_weight": 4.0}):
        with pytest.raises(AfpqError, match=r"tensor model\.norm\.weight contains NaN or Inf"):
            afpq.quantize(tiny_copy, tmp_path / "out", text="abc " * 200, settings=settings, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("out*"))


def test_biases_and_a_tied_embedding(tmp_path: Path) -> None:
    save_tied_qwen2(tmp_path / "model")
    for name in ("model.layers.0.self_attn.q_proj.bias", EMBEDDING):
        whole = load_file(tmp_path / "model" / "model.safetensors")
        spoil(tmp_path / "model", name, math.inf)
        with pytest.raises(AfpqError, match=rf"tensor {name} contains"):
            afpq.quantize(tmp_path / "model", tmp_path / "out")
        save_file(whole, tmp_path / "model" / "model.safetensors", {"format": "pt"})


def test_an_import_checks_what_it_copies(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, Layout())
    spoil(tiny_copy, NORM, math.nan)
    with pytest.raises(AfpqError, match=rf"tensor {NORM} contains NaN or Inf"):
        afpq.import_model(tiny_copy, tmp_path / "out")


def test_tensors_that_the_model_does_not_have_may_hold_anything(tiny_copy: Path, tmp_path: Path) -> None:
    """Old checkpoints carry masks of -inf and rotary tables that no model reads any more."""
    mask = torch.full((4, 4), -math.inf).triu(1)
    edit_weights(tiny_copy, lambda t: t.update({"model.layers.0.self_attn.mask": mask}))
    afpq.quantize(tiny_copy, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.layers.0.self_attn.mask"], mask)


def test_buffers_of_the_model_may_be_infinite(tiny_copy: Path) -> None:
    model = build_skeleton(tiny_copy)
    norm = model.get_submodule("model.norm")
    edit_weights(tiny_copy, lambda t: t.update({"model.norm.mask": torch.full((4,), -math.inf)}))
    norm.register_buffer("mask", torch.zeros(4))
    plan = make_plan(open_checkpoint(tiny_copy), model, Recipe(afpq.parse_scheme("nf4-asym-g64")))
    assert "model.norm.mask" in plan.names
    check_kept(plan, model)
    del norm.mask
    norm.mask = nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(AfpqError, match=r"model\.norm\.mask contains"):
        check_kept(plan, model)


def test_biases_of_experts_in_one_tensor(tmp_path: Path) -> None:
    config = GptOssConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2, head_dim=8, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    name = next(n for n in sorted(names) if n.endswith("experts.gate_up_proj_bias"))
    edit_weights(tmp_path / "model", lambda t: [value.nan_to_num_() for value in t.values()])
    spoil(tmp_path / "model", name, math.nan)
    with pytest.raises(AfpqError, match=rf"tensor {name} contains"):
        afpq.quantize(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_is_checked(dtype: torch.dtype) -> None:
    """The largest finite numbers are none of those, though their sum would be."""
    most = torch.full((64,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert is_finite(most) and is_finite(torch.zeros(0, dtype=dtype))
    most[7] = math.nan
    assert not is_finite(most)
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        most[7] = -math.inf
        assert not is_finite(most)
