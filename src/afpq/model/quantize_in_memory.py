# SPDX-License-Identifier: MIT
"""Quantize a model that is in memory already: its linears become AfpqLinear, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afpq.algorithms.methods import METHODS, solve_without_data
from afpq.errors import AfpqError
from afpq.model.blocks import TransposedLinear, find_blocks, find_linears, replace_module
from afpq.model.coverage import warn_of_left
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import EmbeddingAndHead, settle_recipe, untie
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.model.unfuse import unfuse
from afpq.numerics.formats import repeated_codebook_bytes
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


@torch.no_grad()
def quantize_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the linears inside the model's blocks, and its ends, in place, as the recipe says; returns the model.

    What stays as it was is logged as a warning where it is much. Raises AfpqError for NaN or Inf weights, where nothing
    is left to quantize, and for methods that need text.
    """
    if METHODS[recipe.method].calibrated:
        raise AfpqError(f"method {recipe.method!r} needs calibration text; use afpq.quantize, and load its result")
    unfuse(model, lambda name: recipe.scheme_for(name) is not None)
    blocks = [block.name for block in find_blocks(model)]
    recipe, ends = settle_recipe(model, recipe)
    chosen = [(name, linear, recipe.scheme_for(name)) for name, linear in find_linears(model)]
    if all(scheme is None for _, _, scheme in chosen) and not ends.schemes(recipe):
        raise AfpqError("no linear layer left to quantize; see skip")
    for name, linear, scheme in chosen:
        if scheme is not None:
            solved = _solve(name, linear.weight, scheme, recipe)
            layer = AfpqLinear.from_weight(solved, linear.bias, linear.weight.dtype)
            layer.conv1d = isinstance(linear, TransposedLinear)
            replace_module(model, name, layer)
    _quantize_ends(model, ends, recipe)
    warn_of_left(model, blocks)
    return model


def _solve(name: str, weight: Tensor, scheme: Scheme, recipe: Recipe) -> QuantizedWeight:
    """The weight of the module called `name`, by the recipe's method."""
    return solve_without_data(f"{name}.weight", recipe.method, weight, scheme, recipe.solver_options, recipe.search)


def _quantize_ends(model: nn.Module, ends: EmbeddingAndHead, recipe: Recipe) -> None:
    schemes = ends.schemes(recipe)
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        new: nn.Module
        if isinstance(module, nn.Embedding):
            new = AfpqEmbedding.from_weight(_solve(name, module.weight, scheme, recipe), module)
        elif ends.tied:
            table = model.get_submodule(ends.embedding or "")
            assert isinstance(module, nn.Linear) and isinstance(table, AfpqEmbedding)
            new = AfpqTiedHead(table, module.bias)
        else:
            assert isinstance(module, nn.Linear)
            new = AfpqLinear.from_weight(_solve(name, module.weight, scheme, recipe), module.bias)
            new.readable = False
        replace_module(model, name, new)
    untie(model, schemes)


def model_bits(model: nn.Module) -> float:
    """True bits per quantized weight of a model in memory; 0 if it has none."""
    layers = [m for m in model.modules() if isinstance(m, PackedModule) and not isinstance(m, AfpqTiedHead)]
    total = sum(tensor.nbytes for layer in layers for tensor in layer.packed().values())
    formats = [layer.scheme.format for layer in layers]
    total += sum(format.codebook_bytes for format in formats) - repeated_codebook_bytes(formats)
    weights = sum(layer.rows * layer.columns for layer in layers)
    return 8 * total / weights if weights else 0.0
