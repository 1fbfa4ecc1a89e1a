# SPDX-License-Identifier: MIT
"""Turn every weight matrix inside a model into a linear: GPT-2's Conv1D, and experts in 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from afpq.model.blocks import TransposedLinear, conv1d_linears, replace_module
from afpq.model.experts import all_or_none, expert_form, fill_experts, split_experts
from afpq.model.renamed_tensors import TensorNames


@torch.no_grad()
def unfuse(model: nn.Module, chosen: Callable[[str], bool] = lambda _name: True) -> None:
    """Replace each Conv1D and each fused module of experts by linears, in place; the model's outputs stay.

    `chosen(name)` selects the linears. They hold views of the old parameters, on the same device. Raises AfpqError if
    `chosen` selects only some of a module's experts.
    """
    for name, conv in conv1d_linears(model):
        if chosen(name):
            in_features, out_features = conv.weight.shape
            linear = TransposedLinear(in_features, out_features, device="meta", dtype=conv.weight.dtype)
            linear.weight = nn.Parameter(conv.weight.T, requires_grad=False)
            linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
            replace_module(model, name, linear)
    leaves = TensorNames(model).leaves()
    for name, module in list(model.named_modules()):
        form = expert_form(module, leaves)
        if form is not None and all_or_none(name, [chosen(f"{name}.{linear}") for linear in form.linears()]):
            split = split_experts(module, form)
            fill_experts(split, module)
            replace_module(model, name, split)
