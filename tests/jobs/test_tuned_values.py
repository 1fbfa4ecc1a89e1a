# SPDX-License-Identifier: MIT
"""Tuned values: their gradients are those of the scales and vectors that are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from end_pass_models import pair, random_windows, vectors_of

from afpq.jobs.end_pass import kl
from afpq.jobs.tuned_values import TunedValues


def test_gradients_are_those_of_scales_and_vectors(tiny_model_dir: Path) -> None:
    """One step against the gradient lowers the loss as much as the gradient says (float32 scales: no storage)."""
    model, original = pair(tiny_model_dir, "nf3-asym-g32-float32")
    tuned = TunedValues(model, vectors_of(model))
    ids = random_windows(4)
    with torch.no_grad():
        reference = original(ids).logits
    loss = kl(reference, tuned.logits(ids))
    gradients = torch.autograd.grad(loss, tuned.moves())
    assert all(bool(g.any()) for g in gradients)
    size = 1e-3 / sum(g.square().sum() for g in gradients).sqrt()
    with torch.no_grad():
        for move, gradient in zip(tuned.moves(), gradients):
            move -= size * gradient
        lower = kl(reference, tuned.logits(ids))
    expected = size * sum(g.square().sum() for g in gradients)
    assert (loss - lower).item() == pytest.approx(expected.item(), rel=0.2)
