# SPDX-License-Identifier: MIT
"""Read text, tokenize it and cut it into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq.errors import AfpqError

# name -> (hub path, configuration, test split, column), joined by blank lines as in the GPTQ papers;
# calibration uses the training split, never the test split
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
    "c4": ("allenai/c4", "en", "validation", "text"),
}
_C4_TEXTS = 1100  # the GPTQ papers read 256 windows of 2048 tokens; this many texts hold them


def read_text(file: str | Path | None, dataset: str | None, calibration: bool = False) -> str:
    """Read a UTF-8 file, or a named dataset (needs `pip install 'afpq[eval]'` and the network).

    Of a dataset it reads the test split, or the training split for `calibration`. Raises AfpqError for neither or both,
    an unreadable or empty file, and a name that is not in DATASETS.
    """
    if (file is None) == (dataset is None):
        raise AfpqError("give either a text file (--text FILE) or a dataset (--dataset NAME)")
    text = _dataset_text(dataset, calibration) if dataset is not None else _file_text(Path(str(file)))
    if not text.strip():
        raise AfpqError(f"{file or dataset}: no text in it")
    return text


def _file_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise AfpqError(f"{path}: no such text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AfpqError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _dataset_text(name: str, calibration: bool) -> str:
    if name not in DATASETS:
        raise AfpqError(f"dataset {name!r}; known: {', '.join(DATASETS)}; or use --text FILE")
    try:
        import datasets
    except ImportError:
        raise AfpqError(f"dataset {name!r} needs the datasets package: pip install 'afpq[eval]'") from None
    path, configuration, split, column = DATASETS[name]
    split = "train" if calibration else split
    try:
        rows = datasets.load_dataset(path, configuration, split=split, streaming=name == "c4")
    except Exception as error:  # datasets raises many kinds: no network, moved, gated
        raise AfpqError(f"dataset {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    texts = [row[column] for row in (rows.take(_C4_TEXTS) if name == "c4" else rows)]
    return (" " if name == "c4" else "\n\n").join(texts)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Tokenize all text as one stream of token ids, int64 [n]."""
    ids = tokenizer(text, return_tensors=None, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def windows(tokens: Tensor, length: int, max_tokens: int | None = None) -> Tensor:
    """Cut non-overlapping windows [count, length] from the start; a rest shorter than a window is dropped.

    A text shorter than one window is a single shorter one. `max_tokens` truncates the stream first. Raises AfpqError
    for fewer than two tokens: none could be predicted.
    """
    if length < 2:
        raise AfpqError(f"sequence length {length}: at least 2 are needed to predict a token")
    if max_tokens is not None and max_tokens < 2:
        raise AfpqError(f"{max_tokens} tokens at most: at least 2 are needed to predict one")
    tokens = tokens[:max_tokens]
    if len(tokens) < 2:
        raise AfpqError(f"text of {len(tokens)} tokens: at least 2 are needed to predict one")
    length = min(length, len(tokens))
    return tokens[: len(tokens) // length * length].view(-1, length)


def sample_windows(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """Cut `count` windows [count, length] at the `window_starts`.

    A text of at most `length` tokens gives a single window of all of it. Raises AfpqError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise AfpqError(f"calibration text of {len(tokens)} tokens: at least 2 are needed, and thousands are better")
    return torch.stack([tokens[start : start + length] for start in window_starts(len(tokens), count, length, seed)])


def window_starts(total: int, count: int, length: int, seed: int) -> list[int]:
    """Draw the starts of `count` windows in a stream of `total` tokens, one in each of `count` equal parts.

    The same seed gives the same starts. Stratified sampling covers the whole text even if its style changes.
    """
    if total <= length:
        return [0]
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    starts: list[int] = (places / count * (total - length + 1)).long().tolist()
    return starts


def unused_windows(tokens: Tensor, starts: list[int], used: int, length: int, limit: int) -> Tensor:
    """Cut at most `limit` windows [n, length], spread over the text, outside the windows of `used` tokens at `starts`.

    Empty if no gap between those is long enough.
    """
    ends = [0, *(start + used for start in sorted(starts))]
    free = [
        place
        for end, start in zip(ends, [*sorted(starts), len(tokens)])
        for place in range(end, start - length + 1, length)
    ]
    chosen = [free[index * len(free) // limit] for index in range(limit)] if len(free) > limit else free
    return torch.stack([tokens[place : place + length] for place in chosen]) if chosen else tokens.new_empty(0, length)
