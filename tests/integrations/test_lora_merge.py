# SPDX-License-Identifier: MIT
"""Merging adapters: as float without loss, or requantized, and unmerged to the byte. Needs PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_models import (
    KINDS,
    RESULTS,
    adapted,
    again,
    assert_same,
    fill,
    layers,
    load,
    logits,
    lossy,
    packed,
)
from lora_models import saved as saved  # the fixture
from torch import nn

from afpq import AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.integrations.lora_merge import requantized
from afpq.integrations.peft import AfpqLoraLinear
from afpq.model.quantize_in_memory import quantize_model

# Transformers warns of its own name, at the place of whoever catches warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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
