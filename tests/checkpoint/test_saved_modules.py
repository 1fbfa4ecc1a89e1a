# SPDX-License-Identifier: MIT
"""A quantized checkpoint loaded into another class than its own: what Transformers does with the float checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import WIDE
from torch import Tensor, nn
from transformers import PreTrainedModel

from afpq import AfpqConfig, AfpqError, AfpqLinear
from afpq.checkpoint.info import model_info
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead

LLAMA = {**WIDE, "num_key_value_heads": 2, "initializer_range": 0.1}
IDS = torch.arange(3, 243, 5).view(2, 24)
SAVED: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False)),
    "backbone": ("Qwen3Model", lambda: transformers.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True)),
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(**{**WIDE, "pad_token_id": 0})),
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)),
    "bart": ("BartForConditionalGeneration", lambda: transformers.BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=256, max_position_embeddings=64)),
    "t5": ("T5ForConditionalGeneration", lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=256, decoder_start_token_id=0)),
    "experts": ("MixtralForCausalLM", lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3)),
}  # fmt: skip
LOADED_AS = [
    ("llama", "LlamaForSequenceClassification", 14),
    ("llama", "LlamaForTokenClassification", 14),
    ("llama", "LlamaModel", 14),
    ("backbone", "Qwen3ForCausalLM", 14),
    ("backbone", "Qwen3ForSequenceClassification", 14),
    ("bert", "BertForSequenceClassification", 12),
    ("bert", "BertForQuestionAnswering", 12),
    ("bert", "BertModel", 12),
    ("gpt2", "GPT2ForSequenceClassification", 8),
    ("gpt2", "GPT2ForQuestionAnswering", 8),
    ("bart", "BartForSequenceClassification", 32),
    ("bart", "BartForCausalLM", 20),
    ("t5", "T5EncoderModel", 12),
    ("t5", "T5ForSequenceClassification", 32),
    ("experts", "MixtralForSequenceClassification", 26),
]
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a random float model; made once."""
    place = tmp_path_factory.mktemp("float")

    @cache
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        name, config = SAVED[kind]
        getattr(transformers, name)(config()).save_pretrained(place / kind)
        return place / kind

    return make


@pytest.fixture(scope="module")
def quantized(original: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The same quantized; "KIND, ends" with its embedding and head too. Made once."""
    place = tmp_path_factory.mktemp("quantized")

    @cache
    def make(kind: str) -> Path:
        name, _, ends = kind.partition(", ")
        keys: dict[str, Any] = {"embedding": "same", "lm_head": "same" if name != "backbone" else None} if ends else {}
        model = load(original(name), SAVED[name][0], quantization_config=AfpqConfig(group_size=32, **keys))[0]
        model.save_pretrained(place / kind)
        return place / kind

    return make


def load(directory: Path, architecture: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    kind = getattr(transformers, architecture)
    return kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)  # type: ignore[no-any-return]


def packed(model: nn.Module) -> dict[str, AfpqLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AfpqLinear)}


def change(directory: Path, to: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a model whose tensors were edited."""
    to.mkdir()
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_bytes((directory / "config.json").read_bytes())
    return to


@pytest.mark.parametrize(("kind", "architecture", "count"), LOADED_AS)
def test_another_class_gets_what_the_float_checkpoint_gives_it(
    kind: str, architecture: str, count: int, original: Make, quantized: Make
) -> None:
    plain, expected = load(original(kind), architecture)
    model, found = load(quantized(kind), architecture)
    assert found["missing_keys"] == expected["missing_keys"]
    layers = packed(model)
    assert len(layers) == count
    own = load(quantized(kind), SAVED[kind][0])[0]
    values = {name.split(".", 1)[-1]: m for name, m in packed(own).items()} | packed(own)
    prefix = f"{model.base_model_prefix}."
    for name, layer in layers.items():
        same = values.get(name) or values[name.removeprefix(prefix)]
        assert torch.equal(layer.dequantize(), same.dequantize()), name
    for name in expected["missing_keys"]:  # initialized as Transformers does it: not garbage, not zero
        ours, theirs = model.get_parameter(name), plain.get_parameter(name)
        assert ours.is_floating_point() and ours.dtype == torch.float32
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.3, atol=1e-3) if ours.ndim > 1 else None


@pytest.mark.parametrize("kind", ["llama", "llama, ends"])
def test_a_new_head_is_trained_saved_and_loaded(kind: str, quantized: Make, tmp_path: Path) -> None:
    model = load(quantized(kind), "LlamaForSequenceClassification", num_labels=3)[0]
    model.config.pad_token_id = 0
    loss = model(input_ids=IDS, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert type(model.score) is nn.Linear and model.score.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "again")
    again, found = load(tmp_path / "again", "LlamaForSequenceClassification")
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(model.eval()(input_ids=IDS).logits, again.eval()(input_ids=IDS).logits)
    assert len(model_info(tmp_path / "again").layers) == (15 if "ends" in kind else 14)
    assert "score" in model.config.quantization_config.modules_to_not_convert


@pytest.mark.parametrize("kind", ["backbone", "backbone, ends"])
def test_a_tied_backbone_is_a_language_model(kind: str, quantized: Make, tmp_path: Path) -> None:
    model, found = load(quantized(kind), "Qwen3ForCausalLM")
    assert not found["missing_keys"]
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is (AfpqTiedHead if "ends" in kind else nn.Linear)
    weight = table.dequantize() if isinstance(table, AfpqEmbedding) else table.weight
    model.eval()
    logits, hidden = model(IDS).logits, model.model(IDS).last_hidden_state
    torch.testing.assert_close(logits, hidden @ weight.T, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again", "Qwen3ForCausalLM")[0].eval()(IDS).logits, logits)
    assert len(model_info(tmp_path / "again").layers) == (15 if "ends" in kind else 14)


def test_a_base_model_with_another_prefix(quantized: Make, tmp_path: Path) -> None:
    """Llama's class for questions calls its base `transformer`: Transformers itself would leave all of it random."""
    model, found = load(quantized("llama"), "LlamaForQuestionAnswering")
    assert sorted(found["missing_keys"]) == ["qa_outputs.bias", "qa_outputs.weight"]
    expected = load(quantized("llama"), "LlamaModel")[0].eval()(IDS).last_hidden_state
    assert torch.equal(model.eval().transformer(IDS).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "again")
    again, found = load(tmp_path / "again", "LlamaForQuestionAnswering")
    assert not found["missing_keys"]
    assert torch.equal(again.eval()(IDS).start_logits, model(IDS).start_logits)


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel"])
@pytest.mark.parametrize("parts", [("qweight",), ("scales_pos",), ("scale_grid",), ()], ids=str)
def test_a_missing_part_of_a_block_is_named_whatever_the_class(
    architecture: str, parts: tuple[str, ...], quantized: Make, tmp_path: Path
) -> None:
    """One of its tensors, or (no part named) all of them."""

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(LAYER) and n.endswith(parts or "")]:
            del tensors[name]

    broken = change(quantized("llama"), tmp_path / "broken", drop)
    part = parts[0] if parts else "qweight"
    with pytest.raises(AfpqError, match=rf"{LAYER.removeprefix('model.')}\.{part} is not in the checkpoint"):
        load(broken, architecture)


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaForCausalLM"])
def test_more_layers_than_were_saved_are_an_error(architecture: str, quantized: Make) -> None:
    with pytest.raises(AfpqError, match=r"model\.layers\.2\.self_attn\.q_proj\.qweight is not in the checkpoint"):
        load(quantized("llama"), architecture, num_hidden_layers=3)


def test_a_missing_quantized_head_of_the_saved_class_is_named(quantized: Make, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("lm_head")]:
            del tensors[name]

    broken = change(quantized("llama, ends"), tmp_path / "broken", drop)
    with pytest.raises(AfpqError, match=r"lm_head\.qweight is not in the checkpoint"):
        load(broken, "LlamaForCausalLM")


def test_a_class_with_other_names_is_an_error_and_not_random(quantized: Make) -> None:
    with pytest.raises(AfpqError, match=r"no quantized layer under a name of GPT2.*saved from LlamaForCausalLM"):
        load(quantized("llama"), "GPT2LMHeadModel", config=foreign_config(quantized))


def foreign_config(quantized: Make) -> Any:
    """GPT-2's config with the architecture and the quantization of the saved Llama."""
    saved, config = transformers.AutoConfig.from_pretrained(quantized("llama")), SAVED["gpt2"][1]()
    config.quantization_config, config.architectures = saved.quantization_config, saved.architectures
    return config
