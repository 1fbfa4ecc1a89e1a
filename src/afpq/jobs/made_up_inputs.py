# SPDX-License-Identifier: MIT
"""Inputs to try a model on: tokens, images or sound made up from what its config states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

WINDOW_TOKENS = 16  # tokens
SOUND = 8000  # samples of a wave


def made_up_inputs(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (what it is in words, the arguments of `forward`) for what a model may take, tokens alone first.

    Which of them a class takes is found by running it.
    """
    configs = _configs(model.config)
    text = _tokens(model, configs)
    decoded = {}
    if getattr(model.config, "is_encoder_decoder", False) and text is not None:
        decoded = {"decoder_input_ids": text}
    generator = torch.Generator().manual_seed(0)
    other = [
        ("a made-up image", "pixel_values", _image_shape(configs)),
        ("made-up features of sound", "input_features", _features_shape(configs)),
        ("a made-up sound", "input_values", (1, SOUND)),
    ]
    if text is not None:
        yield f"{text.shape[-1]} tokens", {"input_ids": text, **decoded}
        if len(text) == 1 and decoded:  # a decoder of several streams of sound behind an encoder of text
            rows = _value(configs, "num_codebooks")
            if rows is not None:
                streams = {"input_ids": text, "decoder_input_ids": text.expand(rows, -1)}
                yield f"{text.shape[-1]} tokens", streams
    for words, name, shape in other:
        if shape is not None:
            values = torch.randn(shape, generator=generator)
            yield words, {name: values, **decoded}
            if text is not None and not decoded:
                yield f"{text.shape[-1]} tokens and {words}", {"input_ids": text, name: values}


def _configs(config: Any) -> list[Any]:
    """A config and those inside it."""
    return [config, *(part for key in getattr(config, "sub_configs", {}) if (part := getattr(config, key, None)))]


def _value(configs: list[Any], name: str) -> int | None:
    """The first whole number of this name."""
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _tokens(model: Any, configs: list[Any]) -> Tensor | None:
    """Tokens [1, tokens] that every vocabulary has; [streams, tokens] for a decoder of several streams of sound."""
    sizes = [size for config in configs if isinstance(size := getattr(config, "vocab_size", None), int) and size > 0]
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    entries = getattr(table, "num_embeddings", None)
    if isinstance(entries, int):
        sizes.append(entries)
    if not sizes:
        return None
    streams = _value([model.config], "num_codebooks") or 1
    return (torch.arange(WINDOW_TOKENS)[None] * 7919 % min(sizes)).expand(streams, -1)


def _image_shape(configs: list[Any]) -> tuple[int, ...] | None:
    """Return [1, channels, height, width] of the images that the config is about."""
    size = next((value for config in configs if (value := getattr(config, "image_size", None)) is not None), None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sides) != 2:
        return None
    return (1, _value(configs, "num_channels") or 3, *sides)


def _features_shape(configs: list[Any]) -> tuple[int, ...] | None:
    bins, length = _value(configs, "num_mel_bins"), _value(configs, "max_source_positions")
    return None if bins is None or length is None else (1, bins, 2 * length)
