# SPDX-License-Identifier: MIT
"""A device is one that computes here, or one clear line."""

from __future__ import annotations

import pytest
import torch

from afpq import AfpqError, CalibrationSettings
from afpq.evaluation.devices import find_device


@pytest.mark.parametrize(("there", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, there: bool, kind: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(1))  # there need not be a GPU here
    assert find_device("auto").type == CalibrationSettings().torch_device().type == kind
    assert find_device("cpu") == CalibrationSettings(device="cpu").torch_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "", "cuda:99", "meta", "cpu:x", "a\nb"])
def test_a_device_that_cannot_be_used(name: str) -> None:
    with pytest.raises(AfpqError, match="cannot be used; try auto or cpu") as error:
        find_device(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
