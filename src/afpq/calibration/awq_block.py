# SPDX-License-Identifier: MIT
"""AWQ on a block: search each fold's channel scales by the error of the module around it, then fold them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from afpq.algorithms import quantize_rtn, search_channel_scales
from afpq.calibration.capture import BlockCall, first_of
from afpq.calibration.stages import arguments_of, input_of
from afpq.model.apply_folds import apply_fold, fold_weights, folds_of, shared_mean
from afpq.model.awq_folds import Fold
from afpq.numerics.scheme import Scheme


@torch.no_grad()
def awq_scale(
    block: nn.Module,
    call: BlockCall,
    hidden: Tensor,
    schemes: Mapping[str, Scheme],
    saved_dtypes: Mapping[str, torch.dtype],
) -> dict[str, float]:
    """Scale a float block's channels in place so that rounding changes its outputs less; its function stays.

    `hidden` is a batch of hidden states that enter the block, `schemes` the linears to be quantized, `saved_dtypes` the
    dtype of each parameter in the files, to which parameters that are not quantized are rounded. Returns, by fold, the
    error left relative to that without scaling; empty if the family has no folds.
    """
    ratios: dict[str, float] = {}
    for fold in folds_of(block):
        if not any(name in schemes for name in fold.linears):
            continue
        ratio, scales = _search(block, fold, call, hidden, schemes)
        if ratio < 1:
            apply_fold(block, fold, scales, saved_dtypes.get(f"{fold.previous}.weight"))
        ratios[f"{fold.previous} -> {', '.join(fold.linears)}"] = ratio
    quantized = {f"{name}.weight" for name in schemes}
    for name, parameter in block.named_parameters():
        if name not in quantized and name in saved_dtypes:
            parameter.copy_(parameter.to(saved_dtypes[name]))
    return ratios


def _search(
    block: nn.Module, fold: Fold, call: BlockCall, hidden: Tensor, schemes: Mapping[str, Scheme]
) -> tuple[float, Tensor]:
    """Return (error left relative to no scaling, the scales [in])."""
    inside = block.get_submodule(fold.inside)  # the block for ""
    args, kwargs = arguments_of(block, fold.inside, call, hidden)
    wanted = _run(inside, args, kwargs)
    magnitude = input_of(block, fold.linears[0], call, hidden).abs().mean(0)
    weights = fold_weights(block, fold)
    originals = [weight.clone() for weight in weights]

    def loss(approximations: list[Tensor]) -> float:
        for weight, approximation in zip(weights, approximations):
            weight.copy_(approximation)
        error = (_run(inside, args, kwargs) - wanted).square().sum().item()
        for weight, original in zip(weights, originals):
            weight.copy_(original)
        return error

    def quantize(index: int, weight: Tensor) -> Tensor:
        scheme = schemes.get(fold.linears[index])
        if scheme is None:
            return weight
        # Learning a codebook for every candidate would take longer than the rest of the search.
        return quantize_rtn(weight, replace(scheme, format=scheme.format.start)).dequantize()

    best = search_channel_scales(originals, shared_mean(block, fold, magnitude), loss, quantize)
    return (best.after / best.before if best.before else 1.0), best.scales


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return first_of(module(*args, **kwargs)).float()
