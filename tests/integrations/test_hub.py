# SPDX-License-Identifier: MIT
"""Pushing a quantized model to the hub, with the hub replaced by a dictionary: all its files, and our card."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import hub as transformers_hub

from afpq import AfpqConfig, quantize
from afpq.checkpoint.reader import CARD, WEIGHTS

IDS = torch.arange(0, 240, 5).view(2, 24)


class Hub:
    """What `huggingface_hub.HfApi` does of it, into a directory for each repository."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        (self.place / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], **_: Any) -> str:
        for operation in operations:
            content = Path(operation.path_or_fileobj).read_bytes()
            (self.place / repo_id / operation.path_in_repo).write_bytes(content)
        return "a commit"

    def card(self, repo_id: str, **_: Any) -> ModelCard:
        path = self.place / repo_id / CARD
        if not path.exists():
            raise EntryNotFoundError("no card")
        return ModelCard(path.read_text("utf-8"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that stands for the hub."""
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(transformers_hub, "hf_api", lambda: fake)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: fake)
    monkeypatch.setattr(ModelCard, "load", staticmethod(fake.card))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def saved(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized, with its card, picture and log."""
    out = tmp_path_factory.mktemp("saved") / "small"
    quantize(tiny_model_dir, out, "nf3-asym-g64")
    return out


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16, **options).eval()


def test_everything_that_makes_the_model_is_uploaded_with_its_own_card(saved: Path, hub: Path) -> None:
    assert load(saved).push_to_hub("me/small") == "a commit"
    there = hub / "me/small"
    ours, theirs = load_file(saved / WEIGHTS), load_file(there / WEIGHTS)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    keys = json.loads((there / "config.json").read_text())["quantization_config"]
    assert (keys["quant_method"], keys["format"], keys["modules_to_not_convert"]) == ("afpq", "nf3", ["lm_head"])
    assert metadata_load(there / CARD) == metadata_load(saved / CARD)
    text = (there / CARD).read_text("utf-8")
    assert "import afpq" in text and "## Quality" in text
    for name in ("card_errors.png", "afpq_log.jsonl"):  # what the card refers to
        assert name in text and (there / name).read_bytes() == (saved / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(load(there)(IDS).logits, load(saved)(IDS).logits)


def test_tags_asked_for_are_added(saved: Path, hub: Path) -> None:
    load(saved).push_to_hub("me/small", tags=["mine", "nf3"])
    metadata: Any = metadata_load(hub / "me/small" / CARD)
    assert metadata["tags"] == ["afpq", "quantized", "3-bit", "nf3", "rtn", "mine"]


def test_a_model_quantized_on_loading_gets_a_short_card(tiny_model_dir: Path, hub: Path) -> None:
    model = load(tiny_model_dir, quantization_config=AfpqConfig(bits=3))
    model.push_to_hub("me/small")
    there = hub / "me/small"
    metadata: Any = metadata_load(there / CARD)
    assert metadata["library_name"] == "transformers" and "base_model" not in metadata
    assert metadata["tags"] == ["afpq", "quantized", "3-bit", "nf3", "rtn"]
    text = (there / CARD).read_text("utf-8")
    assert "# tiny, nf3-asym-g64-log8 by rtn" in text and "import afpq" in text
    assert str(tiny_model_dir) not in text and "automatically generated" not in text
    with torch.no_grad():
        assert torch.equal(load(there)(IDS).logits, model(IDS).logits)


def test_a_model_of_the_hub_is_named_as_the_base_model(tiny_model_dir: Path, hub: Path) -> None:
    model = load(tiny_model_dir, quantization_config=AfpqConfig())
    model.name_or_path = "some/model"
    model.push_to_hub("me/small")
    metadata: Any = metadata_load(hub / "me/small" / CARD)
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("some/model", "quantized")


def test_a_card_that_is_there_stays(saved: Path, hub: Path) -> None:
    (hub / "me/small").mkdir(parents=True)
    (hub / "me/small" / CARD).write_text("---\ntags:\n- mine\n---\n# My own words\n")
    load(saved).push_to_hub("me/small")
    text = (hub / "me/small" / CARD).read_text("utf-8")
    assert "# My own words" in text and "import afpq" not in text


def test_saving_with_push_to_hub(saved: Path, hub: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/small")
    assert "import afpq" in (hub / "me/small" / CARD).read_text("utf-8")
    assert (hub / "me/small" / WEIGHTS).read_bytes() == (tmp_path / "mine" / WEIGHTS).read_bytes()


def test_a_dequantized_model_is_pushed_as_any_other(saved: Path, hub: Path) -> None:
    model = load(saved).dequantize()
    model.push_to_hub("me/plain")
    there = hub / "me/plain"
    assert "quantization_config" not in json.loads((there / "config.json").read_text())
    assert "automatically generated" in (there / CARD).read_text("utf-8")


def test_a_copied_model_pushes_its_own_weights(saved: Path, hub: Path) -> None:
    model = load(saved)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.fill_(3)
    other.push_to_hub("me/other")
    model.push_to_hub("me/small")
    assert bool((load_file(hub / "me/other" / WEIGHTS)["model.norm.weight"] == 3).all())
    assert bool((load_file(hub / "me/small" / WEIGHTS)["model.norm.weight"] == 1).all())
    assert "import afpq" in (hub / "me/other" / CARD).read_text("utf-8")


def test_a_model_s_memory_is_free_as_soon_as_it_is_deleted(saved: Path) -> None:
    model = load(saved)
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.qweight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_models_of_others_are_pushed_as_before(tiny_model_dir: Path, hub: Path) -> None:
    load(tiny_model_dir).push_to_hub("me/plain")
    assert "automatically generated" in (hub / "me/plain" / CARD).read_text("utf-8")
