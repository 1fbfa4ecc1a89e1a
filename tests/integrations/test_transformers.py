# SPDX-License-Identifier: MIT
"""The Transformers plug-in: saving, loading, configs, and refusing what is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_weights
from loaded_models import CONFIGS, IDS, UP, WEIGHTS, load, logits, schemes_of
from loaded_models import saved as saved  # the fixture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from afpq import AfpqConfig, AfpqError, parse_scheme, quantize

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def saved_copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "saved"))


@pytest.mark.parametrize(("scheme", "keys"), CONFIGS, ids=[scheme for scheme, _ in CONFIGS])
def test_saving_and_loading_changes_nothing(
    tiny_model_dir: Path, tmp_path: Path, scheme: str, keys: dict[str, Any]
) -> None:
    model = load(tiny_model_dir, quantization_config=AfpqConfig(**keys))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(model), logits(again))
    again.save_pretrained(tmp_path / "again")
    one, two = load_file(tmp_path / "saved" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)


def test_the_model_fits_its_own_weights_in_memory(saved: Path, tiny_model_dir: Path) -> None:
    assert load(saved).get_memory_footprint() < load(tiny_model_dir).get_memory_footprint() / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "auto"])
def test_the_scales_keep_their_dtype(saved: Path, dtype: Any) -> None:
    model = load(saved, dtype=dtype)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.scales_pos.dtype, layer.scales_neg.dtype, layer.qweight.dtype) == (
        torch.float16, torch.float16, torch.uint8,
    )  # fmt: skip
    stored = load_file(saved / WEIGHTS)
    assert torch.equal(layer.scales_pos, stored["model.layers.0.mlp.up_proj.scales_pos"])
    assert model.lm_head.weight.dtype == (torch.float16 if dtype == "auto" else dtype)
    assert logits(model).dtype == model.lm_head.weight.dtype


def test_bfloat16_is_near_float32(saved: Path) -> None:
    exact, rough = logits(load(saved)), logits(load(saved, dtype=torch.bfloat16)).float()
    assert (exact - rough).norm() < 0.05 * exact.norm()


def test_a_cast_model_saves_its_scales_unchanged(saved: Path, tmp_path: Path) -> None:
    load(saved).to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    before, after = load_file(saved / WEIGHTS), load_file(tmp_path / "cast" / WEIGHTS)
    packed = [k for k in before if "proj." in k]
    assert len(packed) == 14 * 3
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in packed)


def test_the_model_without_its_head_loads(saved: Path, tiny_model_dir: Path) -> None:
    # to(): older Transformers ignore dtype for the tensors whose names they adapt to a quantized model
    model = load(saved, auto=AutoModel).to(torch.float32)
    full = load(saved)
    assert len(schemes_of(model)) == 14
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, full.model(IDS).last_hidden_state)
    on_load = load(
        tiny_model_dir,
        auto=AutoModel,
        quantization_config=AfpqConfig(format="nf3", group_size=64, scale_dtype="float16"),
    )
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, on_load(IDS).last_hidden_state)


def test_patterns_hold_without_the_head(tiny_model_dir: Path, tmp_path: Path) -> None:
    overrides = ((r"^model\.layers\.0\.", parse_scheme("nf3-sym-g32")),)
    quantize(tiny_model_dir, tmp_path / "out", "nf4-asym-g64", skip=(r"^model\.layers\.1\.mlp",), overrides=overrides)
    full, base = load(tmp_path / "out"), load(tmp_path / "out", auto=AutoModel)
    assert {f"model.{name}": scheme for name, scheme in schemes_of(base).items()} == schemes_of(full)
    assert len(schemes_of(full)) == 11


def test_a_head_model_saved_by_the_base_model_loads(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = load(
        tiny_model_dir,
        auto=AutoModel,
        quantization_config=AfpqConfig(format="nf3", group_size=64, scale_dtype="float16"),
    )
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", auto=AutoModel)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, again(IDS).last_hidden_state)


def test_dequantize_gives_plain_linears(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    expected = logits(model)
    plain = model.dequantize()
    assert schemes_of(plain) == {}
    assert sum(isinstance(module, nn.Linear) for module in plain.modules()) == 15
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "plain")), expected, rtol=1e-4, atol=1e-5)


def test_modules_not_to_convert_stay_plain_through_saving(tiny_model_dir: Path, tmp_path: Path) -> None:
    kept = ["model.layers.0.mlp", "q_proj", r".*\.1\.self_attn\.[ko]_proj"]  # a parent, last parts, a pattern
    config = AfpqConfig(format="nf4", group_size=64, scale_dtype="float16", modules_to_not_convert=kept)
    model = load(tiny_model_dir, quantization_config=config)
    expected = {
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert set(schemes_of(model)) == expected
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert set(schemes_of(again)) == expected
    assert torch.equal(logits(model), logits(again))


def test_dynamic_overrides_and_skips_through_saving(tiny_model_dir: Path, tmp_path: Path) -> None:
    dynamic = {
        r"+:layers\.0\..*down_proj": {"bits": 8, "format": "int8", "sym": True, "group_size": 32},
        r"o_proj": {"bits": 3, "format": "nf3"},
        r"-:layers\.1\.mlp": {},
    }
    model = load(
        tiny_model_dir, quantization_config=AfpqConfig(bits=4, group_size=64, scale_dtype="float16", dynamic=dynamic)
    )
    schemes = schemes_of(model)
    assert schemes["model.layers.0.mlp.down_proj"] == "int8-sym-g32"
    assert schemes["model.layers.1.self_attn.o_proj"] == "nf3-asym-g64"
    assert schemes["model.layers.0.mlp.up_proj"] == "nf4-asym-g64"
    assert len(schemes) == 11
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert schemes_of(again) == schemes
    assert torch.equal(logits(model), logits(again))


def test_nothing_left_to_quantize_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="no linear"):
        load(tiny_model_dir, quantization_config=AfpqConfig(dynamic={"-:.": {}}))


def test_methods_with_calibration_are_refused_on_load(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="gptq"):
        load(tiny_model_dir, quantization_config=AfpqConfig(method="gptq"))


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": 5},
        {"bits": 4, "format": "nf3"},
        {"format": "nf5"},
        {"group_size": 0},
        {"group_size": "128"},
        {"sym": "yes"},
        {"version": 99},
        {"quant_method": "awq"},
        {"dynamic": {"+:(": {}}},
        {"dynamic": ["a"]},
        {"modules_to_not_convert": "lm_head"},
        {"scale_dtype": "float4"},
        {"scale_search": "luck"},
        {"method": "magic"},
    ],
    ids=str,
)
def test_config_values_that_make_no_sense_are_an_error(keys: dict[str, Any]) -> None:
    with pytest.raises(AfpqError):
        AfpqConfig(**keys)


def test_a_config_survives_json() -> None:
    config = AfpqConfig(
        format="nf3", group_size=64, scale_dtype="float16", modules_to_not_convert=["lm_head"], dynamic={"-:q_proj": {}}
    )
    again = AfpqConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.recipe() == config.recipe()


def edit_keys(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=["head", "no head"])
@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop(f"{UP}.qweight"), f"{UP}.qweight"),
        (lambda t: t.pop(f"{UP}.scales_neg"), f"{UP}.scales_neg"),
        (lambda t: t.update({f"{UP}.qweight": torch.zeros(96, 25, dtype=torch.uint8)}), f"{UP}.qweight"),
        (lambda t: t.update({f"{UP}.scales_pos": torch.ones(1, 96).half()}), f"{UP}.scales_pos"),
        (lambda t: t.update({f"{UP}.qweight": torch.zeros(96, 24)}), f"{UP}.qweight"),
        (lambda t: t.update({f"{UP}.scales_pos": torch.ones(96, 1)}), f"{UP}.scales_pos"),
    ],
    ids=["no codes", "no scales", "codes' shape", "scales' shape", "codes' dtype", "scales' dtype"],
)
def test_a_broken_tensor_is_an_error_that_names_it(
    saved_copy: Path, auto: Any, change: Callable[[dict[str, Tensor]], object], culprit: str
) -> None:
    edit_weights(saved_copy, change)
    with pytest.raises(AfpqError) as error:
        load(saved_copy, auto=auto)
    assert culprit.removeprefix("model.") in str(error.value)


def test_a_missing_tensor_in_shards_is_an_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_model_dir, quantization_config=AfpqConfig(format="nf3", group_size=64, scale_dtype="float16"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))
    shard = tmp_path / index["weight_map"].pop(f"{UP}.qweight")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[f"{UP}.qweight"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(AfpqError, match=f"{UP}.qweight"):
        load(tmp_path)


def test_a_config_that_contradicts_the_tensors_is_an_error(saved_copy: Path) -> None:
    edit_keys(saved_copy, group_size=32)
    with pytest.raises(AfpqError, match="scales"):
        load(saved_copy)


@pytest.mark.parametrize("version", [0, 3, 99, "1", None], ids=str)
def test_an_unknown_version_is_an_error(saved_copy: Path, version: Any) -> None:
    edit_keys(saved_copy, version=version)
    with pytest.raises(AfpqError, match="version"):
        load(saved_copy)


def test_a_missing_bias_of_a_packed_layer_is_an_error(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out")
    edit_weights(tmp_path / "out", lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"))
    with pytest.raises(AfpqError, match=r"q_proj\.bias"):
        load(tmp_path / "out")


def test_generation_runs(saved: Path) -> None:
    model, tokenizer = load(saved), AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer("Once upon", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 17)
    assert torch.equal(out, model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0))
    prompt_and_one = out[:, :10]
    with torch.no_grad():
        assert model(prompt_and_one[:, :9]).logits[0, -1].argmax() == prompt_and_one[0, 9]


def test_gradients_reach_the_input_embeddings(saved: Path) -> None:
    model = load(saved)
    model(IDS, labels=IDS).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and bool(gradient.isfinite().all()) and gradient.abs().sum() > 0


def test_loading_raises_no_warning_about_weights(saved: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_scales_that_are_nan_are_an_error_that_names_the_tensor(saved_copy: Path) -> None:
    """Logits of NaN would be the first to tell, and not where they come from."""
    tensors = load_file(saved_copy / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.scales_neg"][5, 0] = float("nan")
    save_file(tensors, saved_copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AfpqError, match=r"model\.layers\.1\.mlp\.down_proj\.scales_neg"):
        load(saved_copy)


# What these versions of Transformers ask for, where it is not what is installed beside the newest.
OLD = {
    "5.0.0": ["huggingface_hub<2,>=1.3", "tokenizers<=0.23.0,>=0.22", "typer-slim", "httpx", "httpcore", "certifi"],
    "5.16.1": ["huggingface_hub<2,>=1.5", "tokenizers<0.24,>=0.23.1", "httpx", "httpcore", "certifi"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", OLD)
def test_oldest_supported_transformers(version: str) -> None:
    """These same tests, and those of families of models, in a process that imports an older Transformers."""
    directory = REPOSITORY / ".old-transformers" / version
    if not directory.is_dir():
        partial = directory.with_name(f"{version}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        subprocess.run([*install, f"transformers=={version}", *OLD[version]], check=True)
        partial.rename(directory)
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    assert python("-c", "import transformers; print(transformers.__version__)").stdout.strip() == version
    names = (
        "integrations/test_transformers.py", "integrations/test_guarded_saves.py",
        "integrations/test_quantize_loaded.py",
        "model/test_dequantize.py", "test_families.py",
    )  # fmt: skip
    files = (str(REPOSITORY / "tests" / name) for name in names)
    done = python("-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
