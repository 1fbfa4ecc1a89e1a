# SPDX-License-Identifier: MIT
"""Quantize a model in memory: its linears become AfpqLinear, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afpq.algorithms.methods import METHODS, solve_without_data
from afpq.errors import AfpqError
from afpq.model.blocks import TransposedLinear, find_linears, left_in_blocks, replace_module
from afpq.model.coverage import warn_of_left
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import settle_recipe
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.model.patterns import check_patterns
from afpq.model.replace_ends import replace_ends
from afpq.model.unfuse import unfuse
from afpq.numerics.formats import repeated_codebook_bytes
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


@torch.no_grad()
def quantize_model(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Quantize the linears inside the model's blocks, and its ends, in place by the recipe; return the model.

    Logs a warning if many weights stay as they were. Raises AfpqError for NaN or Inf weights, if nothing is left to
    quantize, and for methods that need text.
    """
    if METHODS[recipe.method].calibrated:
        raise AfpqError(f"method {recipe.method!r} needs calibration text; use afpq.quantize, and load its result")
    unfuse(model, lambda name: recipe.scheme_for(name) is not None)
    recipe, ends = settle_recipe(model, recipe)
    linears = find_linears(model)
    check_patterns(recipe, [name for name, _ in linears], model.state_dict())
    chosen = [(name, linear, recipe.scheme_for(name)) for name, linear in linears]
    none_fits = not linears and bool(left_in_blocks(model))
    if all(scheme is None for _, _, scheme in chosen) and not ends.schemes(recipe) and not none_fits:
        raise AfpqError(f"no linear layer {'left to quantize; see skip' if recipe.skip else 'in blocks of the model'}")
    for name, linear, scheme in chosen:
        if scheme is not None:
            solved = _quantize(name, linear.weight, scheme, recipe)
            layer = AfpqLinear.from_weight(solved, linear.bias, linear.weight.dtype)
            layer.conv1d = isinstance(linear, TransposedLinear)
            replace_module(model, name, layer)

    def quantize_end(name: str, module: nn.Module, scheme: Scheme) -> AfpqEmbedding | AfpqLinear:
        solved = _quantize(name, module.get_parameter("weight"), scheme, recipe)
        if isinstance(module, nn.Embedding):
            return AfpqEmbedding.from_weight(solved, module)
        assert isinstance(module, nn.Linear)
        return AfpqLinear.from_weight(solved, module.bias)

    replace_ends(model, ends, ends.schemes(recipe), quantize_end)
    warn_of_left(model)
    return model


def _quantize(name: str, weight: Tensor, scheme: Scheme, recipe: Recipe) -> QuantizedWeight:
    """Quantize the weight of the module called `name` by the recipe's method."""
    return solve_without_data(f"{name}.weight", recipe.method, weight, scheme, recipe.solver_options, recipe.search)


def model_bits(model: nn.Module) -> float:
    """Return the true bits per quantized weight of a model in memory; 0 if it has none."""
    layers = [m for m in model.modules() if isinstance(m, PackedModule) and not isinstance(m, AfpqTiedHead)]
    total = sum(tensor.nbytes for layer in layers for tensor in layer.packed().values())
    formats = [layer.scheme.format for layer in layers]
    total += sum(format.codebook_bytes for format in formats) - repeated_codebook_bytes(formats)
    weights = sum(layer.rows * layer.columns for layer in layers)
    return 8 * total / weights if weights else 0.0
