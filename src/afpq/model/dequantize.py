# SPDX-License-Identifier: MIT
"""Turn a loaded quantized model into an ordinary one: the float modules again, with dequantized weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from afpq.errors import AfpqError
from afpq.model.blocks import replace_module
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import retie
from afpq.model.experts import find_experts, fuse_experts
from afpq.model.linear import AfpqLinear, PackedModule


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
            linear = _plain_linear(module, dtype)
            linear.weight = model.get_input_embeddings().weight
            replace_module(model, name, linear)
            retie(model)
        elif isinstance(module, AfpqLinear):
            replace_module(model, name, _plain_linear(module, dtype))
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


def _plain_linear(layer: AfpqLinear, dtype: torch.dtype) -> nn.Module:
    """Return the linear, or Conv1D, that a layer was made from, with the dequantized weight."""
    weight, plain = layer.dequantize(dtype), _empty_linear(layer)
    plain.weight = nn.Parameter(weight.T.contiguous() if layer.conv1d else weight)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    if hasattr(layer, "_hf_hook"):  # accelerate moves inputs to the device of a layer this way
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(plain, layer._hf_hook)
    plain.train(layer.training)
    return plain


def _empty_linear(layer: AfpqLinear) -> nn.Module:
    if layer.conv1d:
        with torch.device("meta"):
            conv: nn.Module = Conv1D(layer.out_features, layer.in_features)
            return conv
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
