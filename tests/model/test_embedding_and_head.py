# SPDX-License-Identifier: MIT
"""The head and the embedding, tied and apart, in several families: quantized, saved, loaded, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import bert, gemma2, gpt2, llama, opt, save, t5
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from afpq import AfpqConfig, AfpqError, AfpqLinear, Recipe, parse_scheme, quantize
from afpq.checkpoint.info import model_info
from afpq.checkpoint.quantization_config import config_from_json, config_to_json
from afpq.checkpoint.reader import WEIGHTS
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import find_embedding_and_head
from afpq.model.quantize_in_memory import model_bits, quantize_model
from afpq.model.skeleton import build_skeleton

IDS = torch.arange(0, 240, 5).view(2, 24)


FAMILIES = [llama, gemma2, opt, gpt2]


@pytest.fixture(params=[(make, tied) for make in FAMILIES for tied in (True, False)],
                ids=lambda p: f"{p[0].__name__}-{'tied' if p[1] else 'apart'}")  # fmt: skip
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make, tied = request.param
    return save(make(tied), tmp_path / "model")


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def tied_in(directory: Path) -> bool:
    return bool(json.loads((directory / "config.json").read_text())["tie_word_embeddings"])


HEAD = "int8-sym-g32"


def test_both_ends_through_everything(model_dir: Path, tmp_path: Path) -> None:
    """Quantize, load, save, load; quantize on load; in memory; dequantize: the same logits, from one copy."""
    tied = tied_in(model_dir)
    plan = quantize(model_dir, tmp_path / "out", "nf4-asym-g32", lm_head=HEAD, embedding=None if tied else HEAD).plan
    model = load(tmp_path / "out")
    ends = find_embedding_and_head(load(model_dir))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, AfpqEmbedding) and isinstance(head, AfpqTiedHead if tied else AfpqLinear)
    assert len(plan.end_targets) == (1 if tied else 2)
    files = load_file(tmp_path / "out" / WEIGHTS)
    assert f"{ends.embedding}.weight" not in files and f"{ends.head}.weight" not in files
    assert (f"{ends.head}.qweight" in files) is not tied
    found = logits(model)

    # The float model with what the codes say in place of its weights
    plain = load(tmp_path / "out").dequantize()
    torch.testing.assert_close(logits(plain), found, rtol=1e-4, atol=1e-4)
    assert type(plain.get_input_embeddings()) is type(load(model_dir).get_input_embeddings())
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is tied

    model.tie_weights()
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / WEIGHTS)) == set(files)
    assert torch.equal(logits(load(tmp_path / "again")), found)

    config = AfpqConfig(
        format="nf4", group_size=32, scale_dtype="float16", lm_head=HEAD, embedding=None if tied else HEAD
    )
    on_load = load(model_dir, quantization_config=config)
    assert torch.equal(logits(on_load), found)
    on_load.save_pretrained(tmp_path / "on_load")
    assert torch.equal(logits(load(tmp_path / "on_load")), found)
    assert set(load_file(tmp_path / "on_load" / WEIGHTS)) == set(files)
    assert model_info(tmp_path / "on_load").layers == model_info(tmp_path / "out").layers

    recipe = Recipe(
        parse_scheme("nf4-asym-g32"), lm_head=parse_scheme(HEAD), embedding=None if tied else parse_scheme(HEAD)
    )
    assert torch.equal(logits(quantize_model(load(model_dir), recipe)), found)


def test_generation_runs(tmp_path: Path) -> None:
    quantize(save(gemma2(True), tmp_path / "model"), tmp_path / "out", lm_head=True)
    model = load(tmp_path / "out")
    out = model.generate(IDS[1:, :8], max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert model(out[:, :8]).logits[0, -1].argmax() == out[0, 8]
    assert out.shape == (1, 13)


def test_the_base_model_loads_alone(tmp_path: Path) -> None:
    quantize(save(gemma2(True), tmp_path / "model"), tmp_path / "out", lm_head=HEAD)
    base = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, load(tmp_path / "out").model(IDS).last_hidden_state)


def test_the_memory_holds_one_table(tmp_path: Path) -> None:
    quantize(save(llama(True), tmp_path / "model"), tmp_path / "out", "nf4-asym-g32", lm_head="int8-sym-g64")
    model = load(tmp_path / "out")
    # rows of a byte a weight and a scale; what is left of the embedding is a row of ones
    table = 256 * (64 + 2) + 64 * 4
    inside = sum(b.nbytes for b in model.model.layers.buffers()) + sum(p.nbytes for p in model.model.parameters())
    others = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    assert model.get_memory_footprint() - inside - others == table


def test_only_what_was_asked_for(tmp_path: Path) -> None:
    directory = save(llama(False), tmp_path / "model")
    quantize(directory, tmp_path / "head", lm_head=True)
    quantize(directory, tmp_path / "embedding", embedding="nf3-asym-g32")
    head, embedding = load(tmp_path / "head"), load(tmp_path / "embedding")
    assert isinstance(head.lm_head, AfpqLinear) and type(head.get_input_embeddings()) is nn.Embedding
    assert type(embedding.lm_head) is nn.Linear and isinstance(embedding.get_input_embeddings(), AfpqEmbedding)
    assert str(embedding.get_input_embeddings().scheme) == "nf3-asym-g32"


def test_figures_by_hand(tmp_path: Path) -> None:
    directory = save(llama(True), tmp_path / "model")
    plain = quantize(directory, tmp_path / "plain", "nf4-asym-g32").plan
    plan = quantize(directory, tmp_path / "out", "nf4-asym-g32", lm_head="int8-sym-g64").plan
    info = model_info(tmp_path / "out")
    assert info.bits_per_weight == plan.bits_per_weight == plain.bits_per_weight == 5
    assert info.coverage == plan.coverage == plain.coverage == 1
    end = next(layer for layer in info.layers if layer.name == "model.embed_tokens")
    assert info.ends == ("model.embed_tokens",) and end.bits_per_weight == 8 + 16 / 64
    assert info.quantized_parameters == model_info(tmp_path / "plain").quantized_parameters + 256 * 64
    stored = sum(t.nbytes for t in load_file(tmp_path / "out" / WEIGHTS).values())
    assert info.file_bits_per_weight == pytest.approx(8 * stored / info.total_parameters)
    assert plan.file_bits_per_weight == pytest.approx(info.file_bits_per_weight)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.embed_tokens (and lm_head, tied to it) as int8-sym-g64, 8.250 true bits" in card
    linears = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    expected = (5 * linears + 8.25 * 256 * 64) / (linears + 256 * 64)
    assert model_bits(load(tmp_path / "out")) == pytest.approx(expected)


def test_a_tied_weight_stored_twice_is_stored_once(tmp_path: Path) -> None:
    directory = save(llama(True), tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, directory / WEIGHTS)
    quantize(directory, tmp_path / "out", lm_head=HEAD)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "out" / WEIGHTS))
    assert isinstance(load(tmp_path / "out").lm_head, AfpqTiedHead)


@pytest.mark.parametrize(
    "ends",
    [{"lm_head": HEAD}, {"embedding": HEAD}, {"lm_head": "nf3-sym-g32", "embedding": HEAD}],
    ids=lambda e: "+".join(e),
)
def test_weights_that_differ_are_not_tied_whatever_the_config_says(tmp_path: Path, ends: dict[str, str]) -> None:
    directory = save(llama(True), tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, directory / WEIGHTS)
    quantize(directory, tmp_path / "out", **ends)  # type: ignore[arg-type]
    model = load(tmp_path / "out")
    assert isinstance(model.lm_head, AfpqLinear) is ("lm_head" in ends) and not isinstance(model.lm_head, AfpqTiedHead)
    assert isinstance(model.get_input_embeddings(), AfpqEmbedding) is ("embedding" in ends)
    on_load = load(directory, quantization_config=AfpqConfig(**ends))
    assert torch.equal(logits(model), logits(on_load))
    apart = logits(load(directory))
    assert (logits(model) - apart).norm() < 0.5 * apart.norm()


def test_a_table_stored_under_the_heads_name_only_is_an_error(tmp_path: Path) -> None:
    directory = save(llama(True), tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(AfpqError, match=r"model\.embed_tokens\.weight"):
        quantize(directory, tmp_path / "out", lm_head=True)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (bert, {"lm_head": True}, "BertModel has no output head"),
        (t5, {"lm_head": True}, "serves"),
        (lambda: llama(False), {"lm_head": True, "skip": ("head",)}, "lm_head.*skip"),
        (lambda: llama(True), {"lm_head": True, "skip": ("embed",)}, "embed_tokens.*skip"),
        (lambda: llama(True), {"lm_head": "nf3-asym-g32", "embedding": "nf4-asym-g32"}, "one weight"),
        (lambda: llama(True), {"lm_head": "nf5"}, "nf5"),
    ],
    ids=["no head", "more readers", "skipped", "tied and skipped", "tied and two schemes", "no scheme"],
)
def test_what_cannot_be_is_an_error(
    tmp_path: Path, make: Callable[[], PreTrainedModel], options: dict[str, Any], words: str
) -> None:
    directory = save(make(), tmp_path / "model")
    with pytest.raises(AfpqError, match=words):
        quantize(directory, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["embed_tokens.qweight", "embed_tokens.scales"])
def test_a_missing_part_of_a_table_is_named(tmp_path: Path, end: str) -> None:
    quantize(save(llama(True), tmp_path / "model"), tmp_path / "out", lm_head=HEAD)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    del tensors[f"model.{end}"]
    save_file(tensors, tmp_path / "out" / WEIGHTS)
    with pytest.raises(AfpqError, match=end):
        load(tmp_path / "out")
    with pytest.raises(AfpqError, match=end):
        model_info(tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_says_that_it_has_to_come_before(tmp_path: Path, tied: bool) -> None:
    quantize(save(llama(tied), tmp_path / "model"), tmp_path / "out", lm_head=True)
    with pytest.raises(AfpqError, match="resize_token_embeddings, has to come before"):
        load(tmp_path / "out").resize_token_embeddings(300)


def test_keys_and_versions() -> None:
    """Whoever does not know the keys must not misread: version 2 wherever that could be."""
    scheme, other = parse_scheme("nf4-asym-g64"), parse_scheme("fp4-asym-g64")
    for head, embedding, version in (
        (None, None, 1), (scheme, None, 1), (other, None, 2), (None, scheme, 2), (scheme, scheme, 2),
    ):  # fmt: skip
        recipe = Recipe(scheme, lm_head=head, embedding=embedding)
        keys = json.loads(json.dumps(config_to_json(recipe, ["a"])))
        assert keys["version"] == version
        read, kept = config_from_json(keys)
        assert (read.lm_head, read.embedding, kept) == (head, embedding, ["a"])
        assert config_to_json(read, kept)["version"] == version


@pytest.mark.parametrize("value", [3, "nf5-asym-g32", {"bits": 5}, ["nf4"], {"group_size": 0}], ids=str)
def test_a_bad_scheme_of_an_end_is_an_error(value: object) -> None:
    for end in ("lm_head", "embedding"):
        with pytest.raises(AfpqError):
            AfpqConfig(**{end: value})  # type: ignore[arg-type]


def test_ends_are_found(tmp_path: Path) -> None:
    for make, embedding, head in (
        (llama, "model.embed_tokens", "lm_head"),
        (opt, "model.decoder.embed_tokens", "lm_head"),
        (gpt2, "transformer.wte", "lm_head"),
    ):
        for tied in (True, False):
            directory = save(make(tied), tmp_path / f"{make.__name__}-{tied}")
            for model in (load(directory), build_skeleton(directory)):
                ends = find_embedding_and_head(model)
                assert (ends.embedding, ends.head, ends.tied, ends.sharers) == (embedding, head, tied, ())
    nothing = find_embedding_and_head(nn.Sequential(nn.Linear(3, 3)))
    assert (nothing.embedding, nothing.head, nothing.tied) == (None, None, False)
