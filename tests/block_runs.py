# SPDX-License-Identifier: MIT
"""Tiny models, windows of tokens and hidden states in files, for tests that run a block alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from afpq.calibration.hidden_states import Activations

SMALL: dict[str, Any] = {"vocab_size": 99, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}

GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "gemma2": Gemma2Config(**GATED, sliding_window=4),  # two kinds of masks in turn
    "opt": OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neox": GPTNeoXConfig(**{**SMALL, "intermediate_size": 48}),
    "falcon": FalconConfig(**SMALL),
    "bloom": BloomConfig(**SMALL),
}


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()  # type: ignore[no-any-return]


def ids(count: int = 4, length: int = 12) -> Tensor:
    return torch.randint(99, (count, length), generator=torch.Generator().manual_seed(1))


def stored(path: Path, value: Tensor) -> Activations:
    states = Activations(path, tuple(value.shape), create=True)
    states.tensor[:] = value
    return states
