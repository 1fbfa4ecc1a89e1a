# SPDX-License-Identifier: MIT
"""The reference is made of the original classes alone, has the result's weights, and unpacks one unit at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import gpt2, llama, model_of, save
from torch import nn

import afpq
from afpq import AfpqError
from afpq.checkpoint.plan import OUTSIDE, Plan
from afpq.evaluation.loading import load_model
from afpq.jobs.reference_model import UnitWeights, fill_reference, unit_bytes
from afpq.model.experts import AfpqExperts
from afpq.model.linear import PackedModule
from afpq.model.skeleton import build_skeleton

MODELS = {
    "plain": lambda: llama(False), "tied": lambda: llama(True), "Conv1D": lambda: gpt2(True),
    "experts": lambda: model_of("mixtral"), "experts with biases": lambda: model_of("gpt_oss", head_dim=8),
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)


def made(kind: str, place: Path) -> tuple[Plan, Any, Any, UnitWeights]:
    """(the plan, the loaded result, the reference, its weights)."""
    ends = {"embedding": True} if kind == "tied" else {}
    plan = afpq.quantize(save(MODELS[kind](), place / "m"), place / "out", "nf4-asym-g16", evaluate=False, **ends).plan
    model = load_model(place / "out", device="cpu")
    reference = build_skeleton(place / "out", original=True)
    return plan, model, reference, fill_reference(reference, model, plan)


@pytest.mark.parametrize("kind", MODELS)
def test_it_computes_as_the_model_made_float_again(kind: str, tmp_path: Path) -> None:
    plan, model, reference, weights = made(kind, tmp_path)
    assert not any(isinstance(module, (PackedModule, AfpqExperts)) for module in reference.modules())
    assert type(reference) is type(model)
    with torch.no_grad():
        found = reference(IDS).logits
        expected = model.dequantize().float()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert weights.used == {target.module for target in plan.targets}


def test_one_unit_is_unpacked_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, reference, weights = made("tied", tmp_path)
    largest, units, get = 0, [], UnitWeights.get

    def watched(self: UnitWeights, unit: str, *rest: Any) -> Any:
        nonlocal largest
        units.append(unit)
        found = get(self, unit, *rest)
        largest = max(largest, sum(tensor.nbytes for tensor in self.held.values()))
        return found

    monkeypatch.setattr(UnitWeights, "get", watched)
    reference(IDS)
    assert list(dict.fromkeys(units)) == [OUTSIDE, "model.layers.0", "model.layers.1"]
    assert 0 < largest <= unit_bytes(plan)
    assert sum(tensor.nbytes for tensor in weights.held.values()) <= unit_bytes(plan)


def test_a_parameter_that_the_result_lacks_is_named(tmp_path: Path) -> None:
    plan, model, _, _ = made("plain", tmp_path)
    model.model.norm = nn.Identity()
    with pytest.raises(AfpqError, match=r"model\.norm\.weight is not in the loaded model"):
        fill_reference(build_skeleton(tmp_path / "out", original=True), model, plan)
