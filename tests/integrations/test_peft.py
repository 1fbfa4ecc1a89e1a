# SPDX-License-Identifier: MIT
"""LoRA on quantized layers: trains, saves, loads, switches adapters, and refuses what it cannot do. Needs PEFT."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_models import (
    IDS,
    KINDS,
    RESULTS,
    adapted,
    assert_same,
    layers,
    load,
    logits,
    packed,
    peft,
)
from lora_models import saved as saved  # the fixture
from torch import Tensor, nn

from afpq import AfpqConfig, AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.demo.run_demo import HELD_OUT, MODEL
from afpq.evaluation.loading import load_tokenizer
from afpq.evaluation.perplexity import evaluate
from afpq.evaluation.text import tokenize, windows
from afpq.integrations import peft as plugin
from afpq.integrations.peft import AfpqLoraLinear
from afpq.model.quantize_in_memory import quantize_model

# Transformers warns of its own name, at the place of whoever catches warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def learn(model: Any, batches: Iterator[Tensor], steps: int, rate: float) -> list[float]:
    """Losses of so many steps of AdamW on what is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def forever(ids: Tensor) -> Iterator[Tensor]:
    while True:
        yield ids


# -- adapting


def test_all_linear_means_every_quantized_layer_and_not_the_head(saved: Path) -> None:
    model = load(saved)
    names = [name for name, module in model.named_modules() if isinstance(module, AfpqLinear)]
    assert len(names) == 14
    wrapped = adapted(model)
    assert [name.removeprefix("base_model.model.") for name in layers(wrapped)] == names
    assert type(wrapped.get_submodule("base_model.model.lm_head")) is nn.Linear


def test_float_layers_among_the_quantized_get_peft_s_own_layer(tiny_model_dir: Path) -> None:
    config = AfpqConfig(format="nf3", group_size=32, modules_to_not_convert=["lm_head", ".*mlp.*"])
    wrapped = adapted(load(tiny_model_dir, quantization_config=config))
    kinds = {name.split(".")[-1]: type(m) for name, m in wrapped.named_modules() if hasattr(m, "lora_A")}
    assert kinds["q_proj"] is AfpqLoraLinear and kinds["up_proj"] is peft.tuners.lora.Linear and len(kinds) == 7


def test_a_model_without_quantized_layers_is_adapted_as_ever(tiny_model_dir: Path) -> None:
    wrapped = adapted(load(tiny_model_dir))
    assert not layers(wrapped)
    before = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_target_modules_by_name(saved: Path) -> None:
    wrapped = adapted(load(saved), target_modules=["q_proj", "v_proj"])
    assert len(layers(wrapped)) == 4 and {name.split(".")[-1] for name in layers(wrapped)} == {"q_proj", "v_proj"}


def test_a_fresh_adapter_changes_nothing(saved: Path) -> None:
    model = load(saved)
    before = logits(model)
    assert torch.equal(logits(adapted(model, filled=False)), before)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 6}, {"lora_bias": True}], ids=str)
def test_it_computes_and_learns_as_peft_does_on_the_same_float_weights(saved: Path, settings: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    ours, theirs = adapted(load(saved), **settings), adapted(load(saved).dequantize(), **settings)
    assert layers(ours) and not layers(theirs)
    gradients = []
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all("lora_" in name and grad is not None and grad.any() for name, grad in gradients[0].items())
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_changes_adapters_only(tiny_model_dir: Path, kind: str) -> None:
    model = quantize_model(load(tiny_model_dir), Recipe(parse_scheme(kind)))
    before, wrapped = packed(model), adapted(model, filled=False)
    others = {name: p.clone() for name, p in wrapped.named_parameters() if "lora_" not in name}
    losses = learn(wrapped, forever(IDS), 12, 1e-2)
    assert losses[-1] < losses[0] - 0.2
    assert_same(packed(wrapped), before)
    assert all(torch.equal(others[name], p) for name, p in wrapped.named_parameters() if name in others)


def test_dropout_acts_while_training_only(saved: Path) -> None:
    wrapped = adapted(load(saved), lora_dropout=0.5)
    assert torch.equal(logits(wrapped), logits(wrapped))
    wrapped.train()
    assert not torch.equal(logits(wrapped), logits(wrapped))


def test_adapters_take_turns_and_can_be_switched_off(saved: Path) -> None:
    model = load(saved)
    plain = logits(model)
    wrapped = adapted(model, "other")
    first = logits(wrapped)
    wrapped.set_adapter("other")
    second = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), plain)
    assert torch.equal(logits(wrapped), second)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), first)
    assert min((first - second).abs().max(), (first - plain).abs().max(), (second - plain).abs().max()) > 0.1
    mixed = logits(wrapped, adapter_names=["other", "__base__"])
    torch.testing.assert_close(mixed, torch.stack([second[0], plain[1]]), rtol=1e-4, atol=1e-4)
    wrapped.set_adapter("other")
    wrapped.delete_adapter("default")
    assert torch.equal(logits(wrapped), second)


def test_a_bfloat16_model_computes_in_bfloat16_with_float32_adapters(saved: Path) -> None:
    wrapped = adapted(load(saved, torch.bfloat16))
    assert {p.dtype for name, p in wrapped.named_parameters() if "lora_" in name} == {torch.float32}
    assert logits(wrapped).dtype == torch.bfloat16
    torch.testing.assert_close(logits(wrapped).float(), logits(adapted(load(saved))), rtol=0.1, atol=0.1)


# -- saving and loading


def test_an_adapter_is_saved_alone_and_loaded_onto_the_quantized_model(saved: Path, tmp_path: Path) -> None:
    wrapped = adapted(load(saved), modules_to_save=["lm_head"])
    head = wrapped.get_submodule("base_model.model.lm_head").modules_to_save["default"]
    head.weight.data += 0.1
    before = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 300_000
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(saved), tmp_path)), before)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), before)


def test_transformers_loads_an_adapter_too(saved: Path, tmp_path: Path) -> None:
    wrapped = adapted(load(saved))
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(wrapped))
    model = load(saved)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(wrapped))


def test_an_adapter_trained_on_the_float_model_fits_the_quantized_one(
    saved: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    adapted(load(saved).dequantize()).save_pretrained(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(load(saved), tmp_path)
    assert len(layers(wrapped)) == 14
    assert torch.equal(logits(wrapped), logits(adapted(load(saved))))


# -- switching, unloading, and broken adapters


def test_switching_adapters_or_adapting_off_unmerges(saved: Path) -> None:
    model = load(saved)
    plain = logits(model)
    wrapped = adapted(model, "other")
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), plain)
    wrapped.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        wrapped.set_adapter("other")
    assert not any(layer.merged for layer in layers(wrapped).values())


def test_unloading_without_merging_gives_the_quantized_model_back(saved: Path) -> None:
    model = load(saved)
    before = logits(model)
    unloaded = adapted(model).unload()
    assert torch.equal(logits(unloaded), before) and unloaded.config.quantization_config.format == "nf3"


@RESULTS
def test_a_broken_adapter_is_refused_before_anything_is_merged(saved: Path, requantize: bool) -> None:
    wrapped = adapted(load(saved))
    before = packed(wrapped)
    list(layers(wrapped).values())[-1].lora_A["default"].weight.data[0, 0] = math.nan
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(AfpqError, match="adapter default holds NaN"):
            merge(requantize=requantize)
    assert len(layers(wrapped)) == 14 and not any(layer.merged for layer in layers(wrapped).values())
    assert_same(packed(wrapped), before)


# -- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save='q_proj' holds model.layers.0.self_attn.q_proj"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "modules_to_save='mlp'"),
    ],
    ids=str,
)
def test_what_needs_float_weights_is_refused_in_one_line(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AfpqError, match=re.escape(message)) as caught:
        adapted(load(saved), **settings)
    assert "\n" not in str(caught.value) and "quantized" in str(caught.value)


def test_without_peft_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("without_peft", str(plugin.__file__))
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AfpqError, match=r"pip install 'afpq\[peft\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# -- training as people do it


@pytest.mark.parametrize("checkpointing", [True, False])
def test_preparing_for_kbit_training_touches_no_quantized_weight(saved: Path, checkpointing: bool) -> None:
    model = load(saved, torch.bfloat16)
    before = {name: t for name, t in packed(model).items() if not name.endswith("bias")}
    prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    assert_same({name: t for name, t in packed(prepared).items() if not name.endswith("bias")}, before)
    wrapped = adapted(prepared, filled=False)
    losses = learn(wrapped, forever(IDS), 5, 1e-2)
    assert losses[-1] < losses[0]
    assert_same({name: t for name, t in packed(wrapped).items() if not name.endswith("bias")}, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(saved: Path, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(saved)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        wrapped = adapted(model).train()
        wrapped(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert bool(getattr(wrapped.base_model.model.model.layers[0], "gradient_checkpointing", 0)) == checkpointing
        gradients.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.any() for grad in gradients[1].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_trainer_accepts_and_trains_it(saved: Path, tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, gradient_checkpointing=checkpointing, save_steps=6,
    )  # fmt: skip
    wrapped = adapted(load(saved), filled=False)
    before = packed(wrapped)
    trainer = Trainer(wrapped, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert_same(packed(wrapped), before)
    again = peft.PeftModel.from_pretrained(load(saved), tmp_path / "checkpoint-6")
    assert torch.equal(logits(again), logits(wrapped.eval()))


def test_lora_on_nf3_beats_the_frozen_model_on_text_it_was_not_trained_on() -> None:
    config = AfpqConfig(format="nf3", group_size=128, scale_dtype="float16")
    model = load(MODEL, quantization_config=config)
    text = windows(tokenize(load_tokenizer(MODEL), HELD_OUT.read_text("utf-8")), 128)
    held_out = text[3::8]
    rest = torch.cat([text[offset::8] for offset in (0, 1, 2, 4, 5, 6, 7)])
    generator = torch.Generator().manual_seed(0)
    batches = (rest[torch.randint(len(rest), (2,), generator=generator)] for _ in range(25))
    frozen = evaluate(model, held_out).perplexity
    torch.manual_seed(0)
    wrapped = adapted(model, filled=False, r=8, lora_alpha=16)
    learn(wrapped, batches, 25, 2e-3)
    assert evaluate(wrapped, held_out).perplexity < 0.95 * frozen
