# SPDX-License-Identifier: MIT
"""No code of a checkpoint runs unless it was asked for: no pickle is opened, no module of it imported."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

import afpq
from afpq import AfpqError
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import INDEX, WEIGHTS, open_checkpoint
from afpq.commands.application import app
from afpq.evaluation.inspect_weights import inspect_model
from afpq.evaluation.loading import load_model, load_tokenizer

NOT_IMPORTED = {"kernels.triton", "kernels.libafpq_cpu"}  # needs an extra; and no module at all
TRUST = "trust_remote_code"


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every function, method and class of the package."""
    for found in pkgutil.walk_packages(afpq.__path__, "afpq."):
        if found.name in ("afpq.__main__", *(f"afpq.{name}" for name in NOT_IMPORTED)):
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == found.name and callable(value):
                yield f"{found.name}.{name}", value
                members = vars(value).items() if inspect.isclass(value) else ()
                yield from ((f"{found.name}.{name}.{key}", m) for key, m in members if inspect.isfunction(m))


def test_no_function_trusts_a_checkpoint_by_default() -> None:
    defaults = {}
    for name, function in functions():
        try:
            parameters = inspect.signature(function).parameters
        except (ValueError, TypeError):
            continue
        if TRUST in parameters:
            defaults[name] = parameters[TRUST].default
        if dataclasses.is_dataclass(function):
            fields = {field.name: field.default for field in dataclasses.fields(function)}
            defaults |= {f"{name} field": fields[TRUST]} if TRUST in fields else {}
    assert {
        "afpq.jobs.quantize_checkpoint.quantize",
        "afpq.evaluation.loading.load_model",
        "afpq.checkpoint.info.model_info",
    } <= defaults.keys()
    asked = (False, inspect.Parameter.empty, dataclasses.MISSING)
    assert [name for name, default in defaults.items() if default not in asked] == []


def test_no_command_trusts_a_checkpoint_by_default() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {name: option for name, command in commands.items() for option in command.params if option.name == TRUST}
    reading = {name for name, c in commands.items() if any(p.name == "model" for p in c.params)}
    assert reading and options.keys() == reading
    assert all(option.default is False and option.is_flag for option in options.values())


class Bomb:
    """What a pickle runs when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "open": lambda model, _: open_checkpoint(model),
    "info": lambda model, _: model_info(model),
    "inspect": lambda model, _: inspect_model(model),
    "load": lambda model, _: load_model(model, device="cpu"),
    "quantize": lambda model, out: afpq.quantize(model, out, evaluate=False),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.ckpt"])
def test_a_pickle_is_named_and_never_opened(tiny_copy: Path, tmp_path: Path, reader: str, name: str) -> None:
    marker = tmp_path / "ran"
    (tiny_copy / WEIGHTS).unlink()
    (tiny_copy / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(AfpqError, match=rf"only safetensors.*{name} was not opened"):
        READERS[reader](tiny_copy, tmp_path / "out")
    assert not marker.exists()
    pickle.loads((tiny_copy / name).read_bytes())
    assert marker.exists()  # it would have gone off


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model/model.safetensors", "/etc/passwd", "sub/model.safetensors", "", "a\0b"]
)
def test_an_index_leads_to_safetensors_beside_it_only(tiny_copy: Path, tmp_path: Path, reader: str, name: str) -> None:
    marker = tmp_path / "ran"
    (tiny_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    shutil.move(tiny_copy / WEIGHTS, tiny_copy / "other.safetensors")
    (tiny_copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(AfpqError, match="not the name of a safetensors file beside it"):
        READERS[reader](tiny_copy, tmp_path / "out")
    assert not marker.exists()


def test_transformers_opens_no_pickle_of_a_quantized_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    afpq.quantize(tiny_model_dir, out, evaluate=False)
    (out / WEIGHTS).unlink()
    torch.save({"lm_head.weight": torch.zeros(256, 64)}, out / "pytorch_model.bin")
    with pytest.raises(AfpqError, match=r"pytorch_model\.bin.*safetensors only"):
        AutoModelForCausalLM.from_pretrained(out)


MODULE = """
import os
os.makedirs({marker!r}, exist_ok=True)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose config, tokenizer and model come with code, which leaves a mark."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tiny_copy / "own.py").write_text(MODULE.format(marker=str(tmp_path / "ran")))
    config = json.loads((tiny_copy / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (tiny_copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tiny_copy / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (tiny_copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tiny_copy


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("known", [False, True], ids=["its own architecture", "a known architecture"])
def test_code_of_a_checkpoint_does_not_run(with_code: Path, tmp_path: Path, reader: str, known: bool) -> None:
    if known:
        config = json.loads((with_code / "config.json").read_text())
        (with_code / "config.json").write_text(
            json.dumps({**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        )
    try:
        READERS[reader](with_code, tmp_path / "out")
    except AfpqError as error:
        assert not known and str(with_code) in str(error)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_does_not_run(with_code: Path, tmp_path: Path) -> None:
    try:
        load_tokenizer(with_code)
    except AfpqError as error:
        assert str(with_code) in str(error)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_runs_where_it_was_asked_for(with_code: Path, tmp_path: Path) -> None:
    load_model(with_code, trust_remote_code=True, device="cpu")
    assert (tmp_path / "ran").exists()
