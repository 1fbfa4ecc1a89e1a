# SPDX-License-Identifier: MIT
"""Measure a model's perplexity with its standard error, and its KL divergence from a reference model.

Perplexity follows the GPTQ papers: all text as one token stream, windows that do not overlap, the mean negative
log-likelihood of all tokens but each window's first. KL is KL(reference || model), the sharper measure: it reflects
every change of the distribution, not only that of the one token that came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError, named_lack_of_memory
from afpq.evaluation.loading import require_next_token
from afpq.progress import Progress

LOGITS_BATCH_TOKENS = 2048  # whose logits are computed at once


@dataclass(frozen=True)
class Evaluation:
    """Figures over `tokens` predicted tokens; the last three are None without a reference.

    Standard errors take the windows as the independent samples (the tokens, if there is one window).
    `kl_divergence` is in nats per token, `top1_agreement` the share of tokens where both models rate the same
    token highest.
    """

    perplexity: float
    standard_error: float
    tokens: int
    kl_divergence: float | None = None
    kl_standard_error: float | None = None
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return its fields; None for a figure that is not finite, such as the standard error of one sample."""
        return {key: value if value is None or math.isfinite(value) else None for key, value in asdict(self).items()}


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor) -> Iterator[Tensor]:
    """Yield the logits of each window, [length, vocabulary], on the model's device; batched inside.

    `windows` are token ids, int64 [count, length]. Raises AfpqError for tokens beyond the model's vocabulary, and for a
    model that does not predict the next token.
    """
    require_next_token(model)
    device = next(model.parameters()).device
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is not None and int(windows.max()) >= vocabulary:
        raise AfpqError(
            f"the text has token {int(windows.max())}, the model's vocabulary {vocabulary}: another tokenizer?"
        )
    for batch in windows.split(max(1, LOGITS_BATCH_TOKENS // windows.shape[1])):
        yield from model(batch.to(device), use_cache=False).logits


@dataclass(frozen=True)
class TokenScores:
    """Scores of each predicted token, float64 [windows, length - 1] on the CPU.

    `losses`: negative log-likelihoods. With a reference, `divergences`: KL divergences from it, and `agreements`: 1 if
    both models rate the same token highest, else 0.
    """

    losses: Tensor
    divergences: Tensor | None = None
    agreements: Tensor | None = None

    def evaluation(self) -> Evaluation:
        """Return the figures of all tokens. Raises AfpqError if they are not finite."""
        mean, error = _mean_and_error(self.losses)
        if not math.isfinite(mean):
            raise AfpqError(
                "the model's logits are not finite; its weights overflow, or it was loaded in too small a dtype"
            )
        if mean > 700:  # exp of it is no float
            raise AfpqError(f"a loss of {mean:.0f} nats a token: this is not a working model for this text")
        perplexity, tokens = math.exp(mean), self.losses.numel()
        if self.divergences is None or self.agreements is None:
            return Evaluation(perplexity, perplexity * error, tokens)
        kl, kl_error = _mean_and_error(self.divergences)
        if not math.isfinite(kl):
            raise AfpqError("the reference model's logits are not finite")
        return Evaluation(perplexity, perplexity * error, tokens, kl, kl_error, self.agreements.mean().item())


def evaluate(
    model: nn.Module,
    windows: Tensor,
    reference: Iterable[Tensor] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate on token windows [count, length]; see `measure`.

    Raises AfpqError for NaN logits, and for a reference of another vocabulary.
    """
    return measure(model, windows, reference, progress).evaluation()


@torch.no_grad()
@named_lack_of_memory()
def measure(
    model: nn.Module,
    windows: Tensor,
    reference: Iterable[Tensor] | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Run the model on token windows [count, length].

    `reference` gives a reference model's logits of each window in the same order (`logits_of`, or a list of them).
    Raises AfpqError for a reference of another vocabulary, and for a lack of memory.
    """
    losses, divergences, agreements = [], [], []
    others: Iterator[Tensor] | None = None if reference is None else iter(reference)
    for index, (window, logits) in enumerate(zip(windows, logits_of(model, windows), strict=True)):
        log_p = logits[:-1].float().log_softmax(-1)
        losses.append(-log_p.gather(-1, window[1:, None].to(log_p.device)).squeeze(-1).double().cpu())
        if others is not None:
            log_q = next(others)[:-1].to(log_p.device).float().log_softmax(-1)
            if log_q.shape != log_p.shape:
                raise AfpqError(
                    f"reference has {log_q.shape[-1]} tokens in its vocabulary, the model {log_p.shape[-1]}"
                )
            divergences.append((log_q.exp() * (log_q - log_p)).sum(-1).double().cpu())
            agreements.append((log_q.argmax(-1) == log_p.argmax(-1)).double().cpu())
        if progress is not None:
            progress("windows", index + 1, len(windows))
    if others is None:
        return TokenScores(torch.stack(losses))
    return TokenScores(torch.stack(losses), torch.stack(divergences), torch.stack(agreements))


def _mean_and_error(samples: Tensor) -> tuple[float, float]:
    """Return the mean of [windows, tokens], and its standard error with windows as samples."""
    means = samples.mean(1) if len(samples) > 1 else samples.flatten()
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return samples.mean().item(), error
