# SPDX-License-Identifier: MIT
"""Make float modules of packed ones: of one layer, or of a whole model, which is an ordinary one then."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from afpq.errors import AfpqError
from afpq.model.blocks import replace_module
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import retie
from afpq.model.experts import find_experts, fuse_experts
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.numerics.groups import QuantizedWeight


@torch.no_grad()
def unpack_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace packed modules by float ones, in place, and cast everything in the model's dtype to `dtype`.

    Raises AfpqError, with the model unchanged, for a weight too large for `dtype` or one that is offloaded.
    """
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]
    for name, module in packed:
        _check(name, module, dtype)
    before = model.dtype
    for name, module in packed:
        if isinstance(module, AfpqEmbedding):
            replace_module(model, name, module.plain(dtype))
        elif isinstance(module, AfpqTiedHead):
            linear = float_module(module, module.dequantize(dtype))
            linear.weight = model.get_input_embeddings().weight
            replace_module(model, name, linear)
            retie(model)
        elif isinstance(module, AfpqLinear):
            replace_module(model, name, float_module(module, module.dequantize(dtype)))
    experts = find_experts(model)
    for name, split in experts.items():
        replace_module(model, name, fuse_experts(split))
    if experts:
        model._weight_conversions = None  # those of a quantized model; with None it is saved as a float model
    for parameter in model.parameters():
        if parameter.dtype == before:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _check(name: str, module: PackedModule, dtype: torch.dtype) -> None:
    if module.qweight.is_meta:
        raise AfpqError(f"{name}: its weight is offloaded; load the model without offloading to dequantize it")
    if dtype == torch.float16 and not bool(torch.isfinite(module.dequantize(dtype)).all()):
        raise AfpqError(f"{name}: its weights are too large for float16; dequantize to bfloat16 or float32")


def float_module(layer: AfpqLinear, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Return the linear, or Conv1D, that a layer was made from, with this float weight [out, in].

    `bias` is in place of the layer's own; both get the weight's dtype. All else (hooks, training) is as in the layer.
    """
    plain = _empty_linear(layer)
    plain.weight = nn.Parameter(weight.T.contiguous() if layer.conv1d else weight)
    if layer.bias is not None:
        value = (layer.bias if bias is None else bias).detach().to(weight.dtype)
        plain.bias = nn.Parameter(value, requires_grad=layer.bias.requires_grad)
    elif layer.conv1d:  # which always has one
        plain.bias = nn.Parameter(weight.new_zeros(layer.out_features))
    _carry_state(layer, plain)
    return plain


def packed_module(layer: AfpqLinear, weight: QuantizedWeight, bias: Tensor | None = None) -> AfpqLinear:
    """Return a layer with another packed weight and bias (by default its own), and all else as in `layer`."""
    new = AfpqLinear.from_weight(weight, layer.bias if bias is None else bias, layer.dtype)
    new.conv1d, new.readable = layer.conv1d, layer.readable
    _carry_state(layer, new)
    return new


def _carry_state(layer: AfpqLinear, new: nn.Module) -> None:
    if hasattr(layer, "_hf_hook"):  # accelerate moves inputs to the device of a layer this way
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, layer._hf_hook)
    new.train(layer.training)


def _empty_linear(layer: AfpqLinear) -> nn.Module:
    if layer.conv1d:
        with torch.device("meta"):
            conv: nn.Module = Conv1D(layer.out_features, layer.in_features)
            return conv
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
