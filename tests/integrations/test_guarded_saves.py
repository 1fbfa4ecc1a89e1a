# SPDX-License-Identifier: MIT
"""A process without afpq cannot load a quantized model as random numbers; one with afpq notices nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layout import Layout, convert
from conftest import logits_without_afpq
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import afpq
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.unaware_loaders import GUARD, GUARD_KEY, guarded, is_guard, lift_guard, unguarded

WITHOUT_AFPQ = """
import sys, transformers
getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.split(".")[0] == "afpq"]
print("loaded")
"""


def load_without_afpq(directory: Path, kind: str = "AutoModelForCausalLM") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_AFPQ, str(directory), kind]
    return subprocess.run(command, capture_output=True, text=True)


def refused(directory: Path, kind: str = "AutoModelForCausalLM") -> bool:
    done = load_without_afpq(directory, kind)
    return done.returncode == 1 and "loaded" not in done.stdout and GUARD in done.stderr.splitlines()[-1]


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())  # type: ignore[no-any-return]


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)


@pytest.fixture(scope="module")
def quantized(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guarded") / "out"
    afpq.quantize(tiny_model_dir, out)
    return out


def test_the_check_of_plain_loading_works(tiny_model_dir: Path) -> None:
    assert load_without_afpq(tiny_model_dir).stdout == "loaded\n" and not refused(tiny_model_dir)


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_without_afpq_loading_is_an_error_that_names_the_import(quantized: Path, kind: str) -> None:
    assert refused(quantized, kind)


def test_without_the_key_it_would_load_random_numbers(quantized: Path, tmp_path: Path) -> None:
    """What the key is for; if this fails, Transformers has become strict and the key may go."""
    for path in quantized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(unguarded(config_of(quantized))))
    done = load_without_afpq(tmp_path)
    assert done.returncode == 0 and "Unknown quantization type" in done.stderr


def test_checkpoints_without_the_key_load_as_ever(quantized: Path, tmp_path: Path) -> None:
    for path in quantized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(unguarded(config_of(quantized))))
    one, two = load(quantized).state_dict(), load(tmp_path).state_dict()
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_what_transformers_saves_has_the_key_too(quantized: Path, tmp_path: Path, shards: str) -> None:
    model = load(quantized)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert config_of(tmp_path)[GUARD_KEY] == GUARD
    assert refused(tmp_path)
    again = load(tmp_path)
    assert not hasattr(again.config, GUARD_KEY)
    again.save_pretrained(tmp_path, max_shard_size=shards)  # over itself
    assert config_of(tmp_path)[GUARD_KEY] == GUARD


def test_a_config_given_by_hand_and_the_bare_model_load(quantized: Path) -> None:
    assert type(AutoModel.from_pretrained(quantized)).__name__ == "LlamaModel"
    config = AutoConfig.from_pretrained(quantized)
    assert is_guard(getattr(config, GUARD_KEY))
    assert load(quantized, config=config).model.norm.weight.isfinite().all()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantized_and_exported_models_load_without_afpq(quantized: Path, tmp_path: Path) -> None:
    afpq.export(quantized, tmp_path / "exported", "fp32")
    load(quantized).dequantize().save_pretrained(tmp_path / "dequantized")
    names = ["exported", "dequantized"]
    if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):  # the first 5.x keep to a saved config
        load(quantized, quantization_config=afpq.AfpqConfig(dequantize=True)).save_pretrained(tmp_path / "loaded")
        names.append("loaded")
    for name in names:
        assert GUARD_KEY not in config_of(tmp_path / name)
        assert logits_without_afpq(tmp_path / name, tmp_path).isfinite().all()


def test_quantized_while_loading_is_saved_with_the_key(tiny_model_dir: Path, tmp_path: Path) -> None:
    load(tiny_model_dir, quantization_config=afpq.AfpqConfig(bits=4)).save_pretrained(tmp_path)
    assert config_of(tmp_path)[GUARD_KEY] == GUARD


def test_imported_models_have_the_key(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, Layout())
    afpq.import_model(tiny_copy, tmp_path / "out")
    assert config_of(tmp_path / "out")[GUARD_KEY] == GUARD


def test_models_that_are_not_ours_are_saved_as_before(tiny_model_dir: Path, tmp_path: Path) -> None:
    load(tiny_model_dir).save_pretrained(tmp_path)
    assert GUARD_KEY not in config_of(tmp_path)


def test_what_is_pushed_has_the_key(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_pretrained(push_to_hub=True)` uploads before it returns."""
    from afpq.integrations import hub

    seen: list[Any] = []
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", lambda _model, place, *_, **__: seen.append(place))
    hub.wrap_upload()
    model = load(quantized)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    assert GUARD_KEY not in config_of(tmp_path)
    model._upload_modified_files(str(tmp_path), "me/model", {})
    assert seen == [str(tmp_path)] and config_of(tmp_path)[GUARD_KEY] == GUARD


def test_the_text_part_of_a_config_has_the_key_too() -> None:
    """A loader of the text model alone reads only that part, and finds no quantization_config in it."""
    config = {"model_type": "a", "text_config": {"b": 1}, "vision_config": {"c": 2}}
    assert guarded(config) == {
        "model_type": "a", "text_config": {"b": 1, GUARD_KEY: GUARD}, "vision_config": {"c": 2}, GUARD_KEY: GUARD
    }  # fmt: skip
    assert unguarded(guarded(config)) == config
    assert unguarded({GUARD_KEY: "model.safetensors"}) == {GUARD_KEY: "model.safetensors"}


def test_only_the_sentence_is_lifted() -> None:
    class Config:
        def __init__(self, value: str | None, text: Config | None = None) -> None:
            self.transformers_weights, self.text_config = value, text

    config = Config(GUARD, Config(GUARD))
    lift_guard(config)
    assert "transformers_weights" not in vars(config) and "transformers_weights" not in vars(config.text_config)
    named = Config("other.safetensors")
    lift_guard(named)
    assert named.transformers_weights == "other.safetensors"
    assert not is_guard(None) and not is_guard("afpq") and not is_guard("import afpq") and is_guard(GUARD + " again")


def test_the_reader_takes_the_key(quantized: Path) -> None:
    assert open_checkpoint(quantized).config[GUARD_KEY] == GUARD
