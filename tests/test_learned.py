# SPDX-License-Identifier: MIT
"""Learned code books from a checkpoint to a loaded model: in the config, counted, resumed, run by every kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, edit_config, save_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import afpq
from afpq import AfpqConfig, AfpqError, CalibrationSettings, Recipe, parse_scheme
from afpq.algorithms import learned_codebooks as books
from afpq.algorithms.methods import METHODS
from afpq.checkpoint.info import model_info
from afpq.checkpoint.quantization_config import config_from_json, config_to_json
from afpq.checkpoint.reader import WEIGHTS
from afpq.commands.application import app
from afpq.jobs.export import export
from afpq.jobs.finish_directory import LOG_NAME
from afpq.kernels import reference
from afpq.model.linear import AfpqLinear
from afpq.model.quantize_in_memory import model_bits, quantize_model
from afpq.numerics.formats import parse_format
from afpq.numerics.scheme import Scheme
from afpq.recipe import exactly, name_of

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = CalibrationSettings(samples=4, seq_len=32)
IDS = torch.arange(0, 240, 5).view(2, 24)
SCHEME = "learned3-asym-g32-log8"


@pytest.fixture(autouse=True)
def learn_in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good a book becomes is for test_books.py."""
    for name, value in (("TRIAL", 1), ("ROUNDS", 1), ("STEPS", 2)):
        monkeypatch.setattr(books, name, value)


def quantize(model: Path, out: Path, scheme: str = SCHEME, method: str = "rtn", **options: Any) -> Any:
    text = TEXT if METHODS[method].calibrated else None
    options = {"settings": SETTINGS, "evaluate": False, **options}
    return afpq.quantize(model, out, scheme, method=method, text=text, **options).plan


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def keys_of(directory: Path) -> dict[str, Any]:
    keys: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return keys


def schemes_of(model: Any) -> dict[str, str]:
    return {name: str(m.scheme) for name, m in model.named_modules() if isinstance(m, AfpqLinear)}


@pytest.mark.parametrize(
    ("scheme", "method"),
    [(SCHEME, method) for method in METHODS] + [("learned2-sym-g16", "gptq"), ("learned4-asym-g-1-float32", "rtn")],
)
def test_each_layer_has_a_book_of_its_own_from_quantizing_to_saving_again(
    tiny_model_dir: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    quantize(tiny_model_dir, tmp_path / "out", scheme, method)
    model = load(tmp_path / "out")
    found = schemes_of(model)
    notes = [json.loads(line) for line in (tmp_path / "out" / LOG_NAME).read_text().splitlines()]
    assert found == {note["module"]: note["scheme"] for note in notes} and len(found) == 14
    assert len(set(found.values())) == 14
    assert all(s.startswith("lut:") and s.endswith(scheme.partition("-")[2]) for s in found.values())
    assert keys_of(tmp_path / "out")["format"] == scheme.partition("-")[0]
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    export(tmp_path / "out", tmp_path / "plain", torch.float32)
    torch.testing.assert_close(logits(load(tmp_path / "plain")), logits(model), rtol=1e-4, atol=1e-4)


def test_in_memory_and_while_loading_it_is_the_same(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out", scale_search="mse")
    expected = logits(load(tmp_path / "out"))
    in_memory = quantize_model(load(tiny_model_dir), Recipe(parse_scheme(SCHEME), scale_search="mse"))
    assert torch.equal(logits(in_memory), expected)
    config = AfpqConfig(format="learned3", group_size=32, scale_search="mse")
    on_load = load(tiny_model_dir, quantization_config=config)
    assert torch.equal(logits(on_load), expected)
    on_load.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    ours, theirs = keys_of(tmp_path / "out")["dynamic"], keys_of(tmp_path / "saved")["dynamic"]
    assert {key: value["format"] for key, value in ours.items()} == {key: v["format"] for key, v in theirs.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_ends_have_books_too(make_model: ModelMaker, tmp_path: Path, tied: bool, method: str) -> None:
    source = make_model(tmp_path / "model", tie_word_embeddings=tied)
    ends: dict[str, Any] = {"lm_head": True, "embedding": True if tied else "learned4-sym-g16"}
    quantize(source, tmp_path / "out", method=method, **ends)
    keys = keys_of(tmp_path / "out")
    assert keys["embedding"]["format"].startswith("lut:") and keys["lm_head"]["format"].startswith("lut:")
    assert (keys["embedding"] == keys["lm_head"]) == tied and keys["version"] == 2
    model = load(tmp_path / "out")
    assert str(model.lm_head.scheme.format) == keys["lm_head"]["format"]
    assert (model.lm_head.scheme == model.model.embed_tokens.scheme) == tied
    if method == "rtn":
        config = AfpqConfig(format="learned3", group_size=32, **ends)
        on_load = load(source, quantization_config=config)
        assert torch.equal(logits(on_load), logits(model))
        on_load.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_overrides_and_skips_hold_beside_books(tiny_model_dir: Path, tmp_path: Path) -> None:
    overrides = (("up_proj", parse_scheme("learned2-sym-g16")), ("0.*down", parse_scheme("nf4-asym-g32")))
    quantize(tiny_model_dir, tmp_path / "out", overrides=overrides, skip=("k_proj",))
    found = schemes_of(load(tmp_path / "out"))
    assert found["model.layers.0.mlp.down_proj"] == "nf4-asym-g32"
    assert len(parse_scheme(found["model.layers.1.mlp.up_proj"]).format.values) == 4
    assert found["model.layers.1.mlp.up_proj"].endswith("-sym-g16") and not any("k_proj" in name for name in found)
    dynamic = {"+:up_proj": {"format": "learned2", "bits": 2, "sym": True, "group_size": 16}, "-:k_proj": {}}
    model = load(tiny_model_dir, quantization_config=AfpqConfig(format="learned3", group_size=32, dynamic=dynamic))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert schemes_of(again) == schemes_of(model) and torch.equal(logits(again), logits(model))
    assert schemes_of(again)["model.layers.1.mlp.up_proj"].endswith("-sym-g16-log8") and len(schemes_of(again)) == 12


def test_a_model_without_its_head_finds_its_books(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    whole, base = load(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert schemes_of(base) == {name.removeprefix("model."): s for name, s in schemes_of(whole).items()}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("finished", [1, 2])
def test_a_stopped_run_ends_with_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, method: str, finished: int
) -> None:
    class Stop(Exception):
        pass

    calls: list[str] = []

    def stop(unit: str, *_: int) -> None:
        calls.append(unit)
        if len(calls) == finished:
            raise Stop

    quantize(tiny_model_dir, tmp_path / "whole", method=method, lm_head=True)
    with pytest.raises(Stop):
        quantize(tiny_model_dir, tmp_path / "out", method=method, lm_head=True, progress=stop)
    quantize(tiny_model_dir, tmp_path / "out", method=method, lm_head=True)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(("scheme", "values"), [(SCHEME, 8), ("learned2-sym-g16", 4), ("learned4-asym-g64", 16)])
def test_a_book_counts_as_the_text_that_it_is(tiny_model_dir: Path, tmp_path: Path, scheme: str, values: int) -> None:
    plan = quantize(tiny_model_dir, tmp_path / "out", scheme, "gptq")
    info = model_info(tmp_path / "out")
    stored = sum(t.nbytes for n, t in load_file(tmp_path / "out" / WEIGHTS).items() if "proj" in n)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert info.bits_per_weight == pytest.approx(8 * (stored + 14 * 7 * values) / weights)
    assert plan.bits_per_weight == info.bits_per_weight == model_bits(load(tmp_path / "out"))
    assert plan.file_bits_per_weight == pytest.approx(info.file_bits_per_weight)
    texts = [entry["format"].removeprefix("lut:") for entry in keys_of(tmp_path / "out")["dynamic"].values()]
    assert all(len(text) < 7 * values for text in texts)


def test_info_and_card_do_not_list_every_book(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    assert model_info(tmp_path / "out").schemes() == ["lut-asym-g32-log8 (14 code books)"]
    assert "lut" not in (tmp_path / "out" / "README.md").read_text()
    result = CliRunner().invoke(app, ["info", str(tmp_path / "out")])
    assert "lut-asym-g32-log8 (14 code books) by rtn" in result.stdout


def test_a_config_without_the_books_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    keys = keys_of(tmp_path / "out")
    lost = keys["dynamic"].pop("+:" + exactly("model.layers.1.mlp.up_proj"))
    assert lost["format"].startswith("lut:")
    edit_config(tmp_path / "out", quantization_config=keys)
    with pytest.raises(AfpqError, match=r"code book.*model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path / "out")
    with pytest.raises(AfpqError, match=r"code book.*model\.layers\.1\.mlp\.up_proj"):
        model_info(tmp_path / "out")


@pytest.mark.parametrize("name", ["learned8", "learned", "learned1", "learned3-"])
def test_other_widths_are_refused(name: str) -> None:
    with pytest.raises(AfpqError, match="learned2, learned3, learned4"):
        parse_format(name)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_expert_has_its_own(tmp_path: Path, kind: str, method: str) -> None:
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
        "vocab_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        ("num_experts" if kind == "qwen3_moe" else "num_local_experts"): 4,
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", method=method)
    model = load(tmp_path / "out")
    assert len(set(schemes_of(model).values())) == len(schemes_of(model)) == 16
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    if method == "rtn":
        config = AfpqConfig(format="learned3", group_size=32)
        on_load = load(tmp_path / "model", quantization_config=config)
        assert torch.equal(logits(on_load), logits(model))
        on_load.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_thousands_of_books_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name is searched for the few real patterns only: with 16 million searches this would take minutes."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(100)]
    schemes = [Scheme(parse_format(f"lut:-1.0:{i / 5000}:0.9:1.0"), 64) for i in range(len(names))]
    rest = ("experts", parse_scheme("nf4-sym-g16"))
    overrides = (*((exactly(n), s) for n, s in zip(names, schemes)), rest)
    searches, search = [], re.search
    monkeypatch.setattr(re, "search", lambda *arguments: (searches.append(1), search(*arguments))[1])
    recipe, _ = config_from_json(config_to_json(Recipe(parse_scheme(SCHEME), overrides=overrides), []))
    found = [recipe.scheme_for(name) for name in names]
    assert [s.format for s in found if s] == [s.format for s in schemes]
    assert recipe.scheme_for("model.layers.0.mlp.experts.100.up_proj") == rest[1]
    assert len(searches) <= 2 * len(names)


def test_a_pattern_of_one_name_keeps_its_place_among_others() -> None:
    one, two, three = (parse_scheme(f"nf4-asym-g{size}") for size in (1, 2, 3))
    recipe = Recipe(three, overrides=(("up", one), (exactly("a.up"), two), (exactly("a.down"), two), ("down", one)))
    assert [recipe.scheme_for(name) for name in ("a.up", "a.down", "b.down", "a.down.x", "c")] == [
        one,
        two,
        one,
        one,
        three,
    ]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"^model\.layers\.0\.up_proj$", "model.layers.0.up_proj"), ("^a-b$", "a-b"), ("^a.b$", None), ("a", None),
        ("^a", None), ("^(a|b)$", None), (r"^a\d$", None), ("^$", None), (r"^a\.b$|c", None),
    ],
)  # fmt: skip
def test_patterns_of_one_name(pattern: str, name: str | None) -> None:
    assert name_of(pattern) == name
    assert name is None or exactly(name) == pattern


@pytest.mark.parametrize("scheme", [SCHEME, "learned2-sym-g16", "learned4-asym-g64"])
def test_every_kernel_runs_a_learned_book(tiny_model_dir: Path, tmp_path: Path, scheme: str) -> None:
    """The library for CPUs (or the reference, without it), the reference, and Triton's kernels in its interpreter."""
    quantize(tiny_model_dir, tmp_path / "out", scheme)
    layer = load(tmp_path / "out").model.layers[0].mlp.gate_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = linear(x, layer.dequantize())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    book = layer.scheme.format
    packed = (layer.qweight, *layer._scale_buffers(), list(book.values), book.bits, layer.scheme.group_size)
    from afpq.kernels.operands import Packed

    weight = Packed._make(packed)
    torch.testing.assert_close(reference.linear(x, weight, None), expected, rtol=1e-4, atol=1e-5)
    pytest.importorskip("triton")
    from afpq.kernels import gpu

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = Packed._make([part.to(device) if isinstance(part, Tensor) else part for part in packed])
    torch.testing.assert_close(gpu.linear(x.to(device), weight, None).cpu(), expected, rtol=1e-4, atol=1e-4)
