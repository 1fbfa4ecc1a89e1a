# SPDX-License-Identifier: MIT
"""Perplexity, its standard error, KL and agreement against independent computations in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import afpq.evaluation.perplexity
from afpq import AfpqError, Recipe, parse_scheme
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.model.quantize_in_memory import quantize_model


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    return load(tiny_model_dir)


@pytest.fixture(scope="module")
def small(tiny_model_dir: Path) -> Any:
    return quantize_model(load(tiny_model_dir), Recipe(parse_scheme("nf3-asym-g64")))


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Seven windows of 25 tokens."""
    return torch.randint(0, 256, (7, 25), generator=torch.Generator().manual_seed(0))


class Fixed(nn.Module):
    """A model that has the given logits [windows, length, vocabulary] whatever it reads; windows count from 0."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls = 0

    def forward(self, ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        first, self.calls = self.calls, self.calls + len(ids)
        return SimpleNamespace(logits=self.logits[first : self.calls])


def log_probabilities(model: Any, text: Tensor) -> Tensor:
    """[windows, length, vocabulary] in float64, one window at a time."""
    with torch.no_grad():
        return torch.cat([model(row[None]).logits.double().log_softmax(-1) for row in text])


def losses_of(model: Any, text: Tensor) -> list[list[float]]:
    """-log p of each predicted token, window by window."""
    log_p = log_probabilities(model, text)
    length = text.shape[1]
    return [[-log_p[w, i - 1, row[i]].item() for i in range(1, length)] for w, row in enumerate(text)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def standard_error(values: list[float]) -> float:
    """Of their mean, from the sample variance."""
    centre = mean(values)
    return math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def test_perplexity_equals_its_definition(model: Any, text: Tensor) -> None:
    losses = losses_of(model, text)
    result = evaluate(model, text)
    assert result.tokens == 7 * 24
    assert result.perplexity == pytest.approx(math.exp(mean([loss for row in losses for loss in row])), rel=1e-5)
    assert result.standard_error == pytest.approx(
        result.perplexity * standard_error([mean(row) for row in losses]), rel=1e-3
    )
    assert (result.kl_divergence, result.kl_standard_error, result.top1_agreement) == (None, None, None)


def test_kl_equals_its_definition(model: Any, small: Any, text: Tensor) -> None:
    q, p = log_probabilities(model, text)[:, :-1], log_probabilities(small, text)[:, :-1]
    divergence = (q.exp() * (q - p)).sum(-1)
    result = evaluate(small, text, logits_of(model, text))
    assert result.kl_divergence is not None and result.kl_divergence > 0
    assert result.kl_divergence == pytest.approx(divergence.mean().item(), rel=1e-3)
    assert result.kl_standard_error == pytest.approx(standard_error(divergence.mean(1).tolist()), rel=1e-3)
    assert result.top1_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item(), abs=1e-9)
    assert result.perplexity == evaluate(small, text).perplexity
    backwards = evaluate(model, text, logits_of(small, text)).kl_divergence
    assert backwards != pytest.approx(result.kl_divergence, rel=1e-6)  # KL has a direction


def test_a_model_equals_itself(model: Any, text: Tensor) -> None:
    result = evaluate(model, text, logits_of(model, text))
    assert result.kl_divergence == pytest.approx(0, abs=1e-9)
    assert result.kl_standard_error == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1


def test_a_kept_list_of_logits_serves_as_the_reference(model: Any, small: Any, text: Tensor) -> None:
    kept = list(logits_of(model, text))
    assert [tuple(logits.shape) for logits in kept] == [(25, 256)] * 7
    assert evaluate(small, text, kept) == evaluate(small, text, logits_of(model, text))
    assert evaluate(small, text, kept) == evaluate(small, text, kept)


def synthetic(losses: list[list[float]]) -> tuple[Fixed, Tensor]:
    """A model of two tokens whose loss on token 0 is as given, and windows of zeros."""
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    unused_last = torch.zeros(len(losses), 1, 2, dtype=torch.float64)
    return Fixed(torch.cat([logits, unused_last], 1).float()), torch.zeros(len(losses), len(losses[0]) + 1).long()


def test_the_standard_error_by_hand() -> None:
    result = evaluate(*synthetic([[1.0, 2.0], [2.0, 3.0], [0.5, 0.5]]))
    mean_loss = 9.0 / 6  # the windows' means are 1.5, 2.5, 0.5: their sample deviation is 1
    assert result.perplexity == pytest.approx(math.exp(mean_loss), rel=1e-6)
    assert result.standard_error == pytest.approx(math.exp(mean_loss) / math.sqrt(3), rel=1e-6)


def test_the_standard_error_of_one_window_takes_its_tokens() -> None:
    result = evaluate(*synthetic([[1.0, 2.0, 3.0]]))
    assert result.perplexity == pytest.approx(math.exp(2), rel=1e-6)
    assert result.standard_error == pytest.approx(math.exp(2) / math.sqrt(3), rel=1e-6)


def test_the_standard_error_tells_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(400, 10, generator=generator) + 0.5
    result = evaluate(*synthetic(losses.tolist()))
    # uniform on [0.5, 1.5): mean 1, variance 1/12, 4000 independent tokens
    assert math.log(result.perplexity) == pytest.approx(1, abs=5 * math.sqrt(1 / 12 / 4000))
    assert result.standard_error / result.perplexity == pytest.approx(math.sqrt(1 / 12 / 4000), rel=0.15)


def test_one_predicted_token_has_no_standard_error() -> None:
    result = evaluate(*synthetic([[1.5]]))
    assert result.tokens == 1
    assert result.perplexity == pytest.approx(math.exp(1.5), rel=1e-6)
    assert result.standard_error is None or not math.isfinite(result.standard_error)


@pytest.mark.parametrize("batch_tokens", [1, 25, 50, 110, 10_000])
def test_batches_do_not_change_the_result(
    model: Any, small: Any, text: Tensor, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(small, text, logits_of(model, text)).to_json()
    monkeypatch.setattr(afpq.evaluation.perplexity, "LOGITS_BATCH_TOKENS", batch_tokens)
    result = evaluate(small, text, logits_of(model, text)).to_json()
    assert result == pytest.approx(expected, rel=1e-4)


def test_progress_counts_the_windows(model: Any, text: Tensor) -> None:
    calls: list[tuple[str, int, int]] = []
    evaluate(model, text, progress=lambda *call: calls.append(call))
    assert calls == [("windows", i, 7) for i in range(1, 8)]


def test_no_gradients_are_kept(model: Any, text: Tensor) -> None:
    assert not any(logits.requires_grad for logits in logits_of(model, text))


def poison(value: float) -> Callable[[Tensor], Tensor]:
    def change(logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[1, 2] = value
        return changed

    return change


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    broken, windows = Fixed(poison(value)(torch.zeros(2, 5, 3))), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(AfpqError, match="finite"):
        evaluate(broken, windows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reference_logits_that_are_not_finite_are_an_error(value: float) -> None:
    windows = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(AfpqError, match="finite"):
        evaluate(Fixed(torch.zeros(2, 5, 3)), windows, poison(value)(torch.zeros(2, 5, 3)))


def test_logits_too_wrong_for_a_number_are_an_error() -> None:
    """A loss of 5000 nats: exp of it is no float."""
    logits = torch.tensor([0.0, 5000.0]).expand(2, 5, 2)
    with pytest.raises(AfpqError):
        evaluate(Fixed(logits), torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("vocabulary", [2, 4])
def test_a_reference_of_another_vocabulary_is_an_error(vocabulary: int) -> None:
    windows = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(AfpqError, match="vocabulary"):
        evaluate(Fixed(torch.zeros(2, 5, 3)), windows, torch.zeros(2, 5, vocabulary))


def test_json_has_the_agreed_keys(model: Any, text: Tensor) -> None:
    keys = {"perplexity", "standard_error", "tokens", "kl_divergence", "top1_agreement"}
    assert keys <= set(evaluate(model, text).to_json())
