# SPDX-License-Identifier: MIT
"""LoRA on quantized layers: learns, saves, loads, merges without loss and comes back to the byte. Needs PEFT."""

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
from conftest import ModelMaker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import afpq
from afpq import AfpqConfig, AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.demo.run_demo import HELD_OUT, MODEL
from afpq.evaluation.loading import load_tokenizer
from afpq.evaluation.perplexity import evaluate
from afpq.evaluation.text import tokenize, windows
from afpq.model.quantize_in_memory import quantize_model

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
from afpq.integrations import peft as plugin  # noqa: E402
from afpq.integrations.lora_merge import requantized  # noqa: E402
from afpq.integrations.peft import AfpqLoraLinear  # noqa: E402

# Transformers warns of its own name, at the place of whoever catches warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(0, 240, 5).view(2, 24)
KINDS = ["nf3-asym-g32", "nf4-asym-g32-log8", "nf4-sym-g16", "int4-asym-g32", "int3-sym-g-1", "fp3-asym-g-1-float32"]
RESULTS = pytest.mark.parametrize("requantize", [False, True], ids=["float", "requantized"])
lossy = pytest.mark.filterwarnings("ignore:rounding the merged weights")  # small random adapters are lost, as it says
again = pytest.mark.filterwarnings("ignore:.*already merged:UserWarning", "ignore:Already following:UserWarning")


@pytest.fixture(scope="module")
def saved(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with biases in its attention, as nf3-asym-g32, for tests that only read it."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tiny", attention_bias=True)
    afpq.quantize(folder / "tiny", folder / "packed", "nf3-asym-g32")
    return folder / "packed"


def load(directory: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


def adapted(model: Any, *names: str, filled: bool = True, **settings: Any) -> Any:
    """The model with an adapter ("default"), and others of the same settings, that are not zero where `filled`."""
    config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **settings}
    result = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name in names:
        result.add_adapter(name, peft.LoraConfig(**config))
    if filled:
        fill(result)
    return result.eval()


def fill(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model(IDS, **options).logits  # type: ignore[no-any-return]


def layers(model: nn.Module) -> dict[str, AfpqLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AfpqLoraLinear)}


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all bytes of all quantized layers, by names without PEFT's parts."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AfpqLinear):
            for part, tensor in module.state_dict().items():
                found[f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{part}"] = tensor.clone()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


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


# -- merging


@lossy
@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_gives_the_same_bytes_back(tiny_model_dir: Path, kind: str) -> None:
    wrapped = adapted(quantize_model(load(tiny_model_dir), Recipe(parse_scheme(kind), scale_search="mse")))
    bytes_before, before = packed(wrapped), logits(wrapped)
    for requantize in (False, True):
        wrapped.merge_adapter(requantize=requantize)
        merged = [layer.get_base_layer() for layer in layers(wrapped).values()]
        assert {type(layer) for layer in merged} == {AfpqLinear if requantize else nn.Linear}
        assert not torch.equal(logits(wrapped), before)
        wrapped.unmerge_adapter()
        assert_same(packed(wrapped), bytes_before)
        assert torch.equal(logits(wrapped), before)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 6}], ids=str)
def test_merging_keeps_what_the_model_computes(saved: Path, settings: dict[str, Any]) -> None:
    wrapped = adapted(load(saved), **settings)
    before = logits(wrapped)
    layer = layers(wrapped)["base_model.model.model.layers.0.self_attn.q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.get_base_layer().dequantize() + (6 / math.sqrt(4) if settings else 8 / 4) * b @ a
    merged = wrapped.merge_and_unload()
    assert not any(isinstance(module, AfpqLinear | AfpqLoraLinear) for module in merged.modules())
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@again
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_layers_have_the_model_s_dtype(saved: Path, dtype: torch.dtype) -> None:
    wrapped = adapted(load(saved, dtype))
    wrapped.merge_adapter()
    assert logits(wrapped).dtype == dtype
    merged = wrapped.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype} and logits(merged).dtype == dtype


@RESULTS
@lossy
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "some"])
def test_a_merged_model_is_saved_as_what_it_is(saved: Path, tmp_path: Path, targets: Any, requantize: bool) -> None:
    merged = adapted(load(saved), target_modules=targets).merge_and_unload(requantize=requantize)
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    kinds = {name: type(m) for name, m in merged.named_modules() if isinstance(m, nn.Linear | AfpqLinear)}
    assert kinds == {name: type(again.get_submodule(name)) for name in kinds}
    quantized = sum(kind is AfpqLinear for kind in kinds.values())
    assert quantized == (14 if requantize else 10 if isinstance(targets, list) else 0)
    assert hasattr(merged.config, "quantization_config") == (quantized > 0)


def test_requantizing_says_how_much_of_the_adapter_it_lost(saved: Path) -> None:
    def run(size: float) -> tuple[Any, dict[str, float]]:
        wrapped = adapted(load(saved))
        fill(wrapped, size)
        return wrapped.merge_and_unload(requantize=True), wrapped.merge_errors

    with pytest.warns(UserWarning, match=r"rounding the merged weights .*9\d%"):
        _, small = run(0.02)
    merged, large = run(0.5)  # without a word
    assert len(small) == len(large) == 14
    assert all(0.7 < error <= 1 for error in small.values()) and all(error < 0.3 for error in large.values())
    wrapped, name = adapted(load(saved)), "model.layers.1.mlp.down_proj"
    fill(wrapped, 0.5)
    layer = layers(wrapped)[f"base_model.model.{name}"]
    change = layer.get_delta_weight("default")
    wanted = layer.get_base_layer().dequantize() + change
    lost = (merged.get_submodule(name).dequantize() - wanted).norm() / change.norm()
    assert large[name] == pytest.approx(lost.item(), rel=1e-3)
    assert str(merged.get_submodule(name).scheme) == "nf3-asym-g32"


@lossy
@again
def test_merging_in_turns_and_into_something_else(saved: Path) -> None:
    wrapped = adapted(load(saved), "other")
    before = packed(wrapped)
    wrapped.base_model.set_adapter(["default", "other"])
    both = logits(wrapped)
    wrapped.merge_adapter(["other"])
    wrapped.merge_adapter(["default"])
    torch.testing.assert_close(logits(wrapped), both, rtol=1e-4, atol=1e-4)
    wrapped.merge_adapter(requantize=True)
    requantized_by_way_of_float = packed(wrapped)
    wrapped.unmerge_adapter()
    assert_same(packed(wrapped), before)
    wrapped.merge_adapter(["other", "default"], requantize=True)
    assert_same(packed(wrapped), requantized_by_way_of_float)
    assert len(requantized_by_way_of_float) == len(before)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)


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


def test_biases_of_adapters_are_merged_where_the_layer_has_one(saved: Path) -> None:
    wrapped = adapted(load(saved), target_modules=["q_proj", "v_proj"], lora_bias=True)
    before = logits(wrapped)
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), before, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="has no bias"):
        wrapped = adapted(load(saved), target_modules=["q_proj", "up_proj"], lora_bias=True)
    with pytest.raises(AfpqError, match="lora_bias"):
        wrapped.merge_and_unload()
    assert len(layers(wrapped)) == 4 and not any(layer.merged for layer in layers(wrapped).values())


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.sampled_from(["absmax", "mse"]), st.integers(0, 10**6), st.floats(-7, 1))
def test_requantizing_never_moves_a_weight_further_than_the_adapter_did(
    kind: str, search: str, seed: int, exponent: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = quantize_rtn(torch.randn(6, 50, generator=generator), parse_scheme(kind), search)
    base, change = old.dequantize(), 10**exponent * torch.randn(6, 50, generator=generator)
    new = requantized(old, base + change)
    assert str(new.scheme) == kind
    assert (new.dequantize() - base - change).norm() <= change.norm() * 1.0001 + 1e-6
    assert torch.equal(requantized(old, base).dequantize(), base)


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
