# SPDX-License-Identifier: MIT
"""Every fold of every known family leaves the model's logits as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from fold_models import CASES, blocks_of, change, logits, original, random_scales
from fold_models import float64 as float64  # the fixture
from torch import Tensor, nn

from afpq.model.apply_folds import apply_fold, fold_weights, folds_of
from afpq.model.awq_folds import FAMILIES, Fold


@pytest.mark.parametrize("case", CASES)
def test_each_fold_leaves_the_logits_as_they_were(case: str) -> None:
    model, before = copy.deepcopy(original(case))
    assert tuple(len(folds_of(block)) for block in blocks_of(model)) == CASES[case][2]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in blocks_of(model):
        for fold in folds_of(block):
            scales = random_scales(block, fold)
            apply_fold(block, fold, scales)
            assert change(logits(model), before) < 1e-9, fold
            for weight in fold_weights(block, fold):  # the producer alone does change them
                weight.data /= scales
            assert change(logits(model), before) > 1e-4, fold
            model.load_state_dict(state)


@pytest.mark.parametrize("case", CASES)
def test_all_folds_at_once_leave_the_logits_as_they_were(case: str) -> None:
    model, before = copy.deepcopy(original(case))
    for block in blocks_of(model):
        for fold in folds_of(block):
            apply_fold(block, fold, random_scales(block, fold))
    assert change(logits(model), before) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_linears_of_a_fold_read_one_tensor_which_shrinks(case: str) -> None:
    """What the search relies on: the linears share their input, and `inside` contains them all."""
    model, _ = copy.deepcopy(original(case))
    block = blocks_of(model)[0]
    for fold in folds_of(block):
        assert all(name.startswith(fold.inside) for name in fold.linears)
        scales = random_scales(block, fold)
        before = inputs_of(model, block, fold)
        apply_fold(block, fold, scales)
        for old, new in zip(before, inputs_of(model, block, fold)):
            torch.testing.assert_close(old, before[0], rtol=0, atol=0)
            torch.testing.assert_close(new * scales, old, rtol=1e-6, atol=1e-9)


def inputs_of(model: nn.Module, block: nn.Module, fold: Fold) -> list[Tensor]:
    seen: list[Tensor] = []
    linears = [block.get_submodule(name) for name in fold.linears]
    handles = [linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for linear in linears]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def test_every_family_is_tested() -> None:
    tested = {type(block).__name__ for case in CASES for block in blocks_of(original(case)[0])}
    assert tested == set(FAMILIES)
