# SPDX-License-Identifier: MIT
"""A model in memory: its blocks' linears are replaced as the recipe says, and it computes with the rounded weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from afpq.errors import AfpqError
from afpq.model.blocks import find_linears
from afpq.model.linear import AfpqLinear
from afpq.model.quantize_in_memory import model_bits, quantize_model
from afpq.numerics.packing import layout, spec_bytes
from afpq.numerics.scheme import Scheme, parse_scheme
from afpq.recipe import Recipe

NF3, INT4 = parse_scheme("nf3-asym-g32"), parse_scheme("int4-asym-g64")
PARTS = [
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
]
LINEARS = [f"model.layers.{index}.{part}" for index in (0, 1) for part in PARTS]
TOKENS = torch.arange(24).view(2, 12)


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """Two layers of random weights; no width is a multiple of 64."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "initializer_range": 0.1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AfpqLinear)]


def test_every_linear_of_the_blocks_is_replaced_and_nothing_else() -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert quantize_model(model, Recipe(NF3)) is model
    assert replaced(model) == LINEARS
    assert find_linears(model) == []
    assert isinstance(model.lm_head, nn.Linear)
    after = model.state_dict()
    rest = [name for name in before if name.removesuffix(".weight") not in LINEARS]
    assert "lm_head.weight" in rest and "model.embed_tokens.weight" in rest and "model.norm.weight" in rest
    assert all(torch.equal(after[name], before[name]) for name in rest)


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("scheme", [NF3, INT4], ids=str)
def test_the_model_computes_with_the_dequantized_weights(scheme: Scheme, search: str) -> None:
    original = tiny_llama(attention_bias=True)
    for _, linear in find_linears(original):
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    model = quantize_model(deepcopy(original), Recipe(scheme, scale_search=search))
    for name, linear in find_linears(original):
        layer = model.get_submodule(name)
        assert isinstance(layer, AfpqLinear)
        linear.weight.data = layer.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, original(TOKENS).logits)


def test_the_result_stays_close_to_the_model() -> None:
    original = tiny_llama()
    model = quantize_model(deepcopy(original), Recipe(parse_scheme("int8-asym-g32")))
    with torch.no_grad():
        logits, expected = model(TOKENS).logits, original(TOKENS).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_skip_and_overrides() -> None:
    recipe = Recipe(NF3, skip=("o_proj", r"layers\.0\.mlp"), overrides=(("q_proj", INT4), ("self_attn|o_proj", NF3)))
    model = quantize_model(tiny_llama(), recipe)
    kept = {name for name, _ in find_linears(model)}
    assert kept == {name for name in LINEARS if "o_proj" in name or "layers.0.mlp" in name}
    for name in replaced(model):
        assert model.get_submodule(name).scheme == (INT4 if "q_proj" in name else NF3)


@pytest.mark.parametrize("skip", ["proj", "", r"^model\."])
def test_nothing_left_to_quantize_is_an_error(skip: str) -> None:
    with pytest.raises(AfpqError, match="no linear layer"):
        quantize_model(tiny_llama(), Recipe(NF3, skip=(skip,)))


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(AfpqError, match="no linear layer"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), Recipe(NF3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_an_error_that_names_the_tensor(bad: float) -> None:
    model, copy = tiny_llama(), tiny_llama()
    for one in (model, copy):
        one.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(AfpqError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: .*NaN or Inf"):
        quantize_model(model, Recipe(NF3))
    recipe = Recipe(NF3, skip=("up_proj",))
    assert len(replaced(quantize_model(copy, recipe))) == len(LINEARS) - 2


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_that_needs_data_is_refused(method: str) -> None:
    with pytest.raises(AfpqError, match=method):
        quantize_model(tiny_llama(), Recipe(NF3, method=method))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_dtype_stays(dtype: torch.dtype) -> None:
    model = quantize_model(tiny_llama().to(dtype), Recipe(NF3))
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.dtype == dtype and bool(torch.isfinite(logits).all())


def test_model_bits_count_every_stored_byte_of_the_quantized_linears() -> None:
    recipe = Recipe(NF3, skip=("o_proj",), overrides=(("q_proj", INT4),))
    original = tiny_llama()
    shapes = [(recipe.scheme_for(name), *linear.weight.shape) for name, linear in find_linears(original)]
    stored = [sum(map(spec_bytes, layout(s, *shape).values())) for s, *shape in shapes if s is not None]
    weights = sum(rows * columns for scheme, rows, columns in shapes if scheme is not None)
    model = quantize_model(original, recipe)
    assert model_bits(model) == pytest.approx(8 * sum(stored) / weights, rel=1e-12)
    assert model_bits(model.to(torch.bfloat16)) == pytest.approx(8 * sum(stored) / weights, rel=1e-12)


def test_model_bits_by_hand() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(256, 8)])
    assert model_bits(model) == 0
    assert model_bits(quantize_model(model, Recipe(parse_scheme("nf3-asym-g128")))) == 3.25
