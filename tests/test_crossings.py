# SPDX-License-Identifier: MIT
"""Kinds of models times features: whatever a quantized model is made of, each feature gives the right logits.

A feature is easily right for a plain model and wrong where a weight is transposed, tied, one of many experts, or read
by code that does not call the layer. Models have one block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from small_models import WIDE
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import afpq
from afpq import AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.evaluation.loading import load_model
from afpq.jobs.end_pass import kl
from afpq.jobs.prepare import Texts, prepare

SCHEME = "nf3-asym-g32"
IDS = torch.arange(3, 243, 5).view(2, 24)
CALIBRATION: dict[str, Any] = {
    "text": "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(2000)),
    "settings": afpq.CalibrationSettings(samples=16, seq_len=24),
}
ONE = {**WIDE, "num_hidden_layers": 1, "initializer_range": 0.1, "tie_word_embeddings": False}
KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**ONE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**{**ONE, "tie_word_embeddings": True})),
    "Conv1D": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.1,
                   bos_token_id=None, eos_token_id=None)
    ),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**ONE, num_key_value_heads=2, num_local_experts=3)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0,
                 eos_token_id=None)
    ),
}  # fmt: skip
DECODERS = [kind for kind in KINDS if kind != "encoder-decoder"]

Make = Callable[[str], Path]


def broken(kinds: list[str], known: dict[str, tuple[type[Exception], str]]) -> list[Any]:
    """All kinds, for parametrize; those that are known to be wrong, with the error they end in and the reason."""
    marks = {k: [pytest.mark.xfail(strict=True, raises=error, reason=why)] for k, (error, why) in known.items()}
    return [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a kind's random float model; made once."""
    place = tmp_path_factory.mktemp("float")

    @cache
    def make(kind: str) -> Path:
        torch.manual_seed(0)
        KINDS[kind]().save_pretrained(place / kind)
        save_tokenizer(place / kind)
        return place / kind

    return make


@pytest.fixture(scope="module")
def quantized(original: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a kind's quantized model, its tied head quantized too; made once."""
    place = tmp_path_factory.mktemp("quantized")

    @cache
    def make(kind: str) -> Path:
        afpq.quantize(original(kind), place / kind, SCHEME, evaluate=False, **ends(kind))
        return place / kind

    return make


def ends(kind: str) -> dict[str, Any]:
    return {"lm_head": SCHEME} if kind == "tied" else {}


def load(directory: Path) -> Any:
    return load_model(directory, device="cpu")


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **decoder).logits  # type: ignore[no-any-return]


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(kind: str, quantized: Make, tmp_path: Path) -> None:
    model = load(quantized(kind))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_saved_and_loaded(kind: str, quantized: Make, tmp_path: Path) -> None:
    model = load(quantized(kind))
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path / "float")
    plain = load(tmp_path / "float")
    assert not any(isinstance(module, AfpqLinear) for module in plain.modules())
    assert_near(logits(plain), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_exported(kind: str, quantized: Make, tmp_path: Path) -> None:
    afpq.export(quantized(kind), tmp_path / "float", "fp32")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert_near(logits(load(tmp_path / "float")), logits(load(quantized(kind))))


def adapted(model: Any, targets: str = "all-linear") -> Any:
    """The model with a LoRA adapter that is not zero."""
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
    pytest.importorskip("afpq.integrations.peft")
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    result = peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in result.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return result.eval()


# Transformers warns of its own name, and PEFT of experts in one tensor, which are linears here.
adapting = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:.*_pattern keys did not match"
)


@adapting
@pytest.mark.parametrize("kind", KINDS)
def test_merged_with_an_adapter_saved_and_loaded(kind: str, quantized: Make, tmp_path: Path) -> None:
    model = load(quantized(kind))
    plain, wrapped = logits(model), adapted(model)
    expected = logits(wrapped)
    assert (expected - plain).abs().max() > 0.1
    merged = wrapped.merge_and_unload()
    assert_near(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_near(logits(load(tmp_path / "merged")), expected)


@adapting
@pytest.mark.filterwarnings("ignore:rounding the merged weights")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_rounded_dequantized_saved_and_loaded(kind: str, quantized: Make, tmp_path: Path) -> None:
    merged = adapted(load(quantized(kind))).merge_and_unload(requantize=True)
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), expected)
    merged.dequantize().save_pretrained(tmp_path / "float")
    assert_near(logits(load(tmp_path / "float")), expected)


@adapting
def test_a_square_transposed_matrix_merged_saved_and_loaded(quantized: Make, tmp_path: Path) -> None:
    """A shape that is wrong is an error on loading; this one would only be wrong logits."""
    merged = adapted(load(quantized("Conv1D")), r".*attn\.c_proj").merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert_near(logits(load(tmp_path / "merged")), expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_end_pass_states_the_kl_of_what_is_saved(kind: str, original: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {**CALIBRATION, "end_pass": 8, **ends(kind)}
    afpq.quantize(original(kind), tmp_path / "out", SCHEME, evaluate=False, **options)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["end_pass"]
    recipe, texts = Recipe(parse_scheme(SCHEME), end_pass=8), Texts(CALIBRATION["text"])
    windows = prepare(original(kind), recipe, texts, settings=CALIBRATION["settings"]).windows
    assert windows is not None and stated["kept_step"] > 0
    judging, reference, model = windows[::8], load(original(kind)), load(tmp_path / "out")
    found = [kl(logits(reference, w), logits(model, w)).item() for w in judging.split(1)]
    assert stated["judging_windows"] == len(found)
    assert sum(found) / len(found) == pytest.approx(stated["kl_after"], rel=1e-3)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_bit_budget_is_kept_by_what_is_loaded(kind: str, original: Make, tmp_path: Path) -> None:
    candidates = ("nf2-asym-g32", "nf4-asym-g32")
    options: dict[str, Any] = {**CALIBRATION, "bits_per_weight": 4.3, "candidates": candidates, **ends(kind)}
    plan = afpq.quantize(original(kind), tmp_path / "out", SCHEME, evaluate=False, **options).plan
    model = load(tmp_path / "out")
    layers = {t.module: model.get_submodule(t.module) for t in plan.block_targets}
    stored = sum(tensor.nbytes for layer in layers.values() for tensor in layer.packed().values())
    assert 3.5 < 8 * stored / sum(layer.rows * layer.columns for layer in layers.values()) <= 4.3
    assert {str(layer.scheme) for layer in layers.values()} == set(candidates)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("options", [{"end_pass": 8}, {"bits_per_weight": 4.3}], ids=["end pass", "bit budget"])
def test_an_encoder_decoder_is_refused_what_reads_text(options: Any, original: Make, tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match=r"does not predict the next token|is an encoder-decoder"):
        afpq.quantize(original("encoder-decoder"), tmp_path / "out", SCHEME, **CALIBRATION, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_weight_is_decoded_in_a_forward(kind: str, quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoded = load(quantized(kind)), []
    dequantize = AfpqLinear.dequantize

    def counted(layer: AfpqLinear, dtype: torch.dtype = torch.float32) -> Tensor:
        decoded.append(layer)
        return dequantize(layer, dtype)

    monkeypatch.setattr(AfpqLinear, "dequantize", counted)
    logits(model)
    assert decoded == []
