# SPDX-License-Identifier: MIT
"""A part's config, such as that of CLIP's text model, gets the quantization of the whole checkpoint it is read from.

Transformers reads the config of one tower from the config.json of both, and leaves the rest of it out: so also
`quantization_config`, without which the tower's packed tensors would be ignored and random weights taken instead. There
is no hook for it; so the reading of config.json is wrapped, unchanged for checkpoints that are not ours.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import PretrainedConfig

from afpq.checkpoint.quantization_config import QUANT_METHOD


def wrap_part_configs() -> None:
    """Wrap the reading of configs so that parts of a quantized model count as quantized; call once."""
    read: Any = PretrainedConfig.get_config_dict.__func__

    @wraps(read)
    def with_quantization(cls: Any, *arguments: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, rest = read(cls, *arguments, **options)
        return with_parts(config, getattr(cls, "model_type", ""), getattr(cls, "base_config_key", "")), rest

    PretrainedConfig.get_config_dict = classmethod(with_quantization)


def with_parts(config: dict[str, Any], model_type: str, key: str) -> dict[str, Any]:
    """Return a config.json whose part for this model type, or under this key, has the whole's `quantization_config`."""
    keys = config.get("quantization_config")
    if not isinstance(keys, dict) or keys.get("quant_method") != QUANT_METHOD or not model_type:
        return config
    if config.get("model_type") == model_type:
        return config
    parts = {
        name: {"quantization_config": keys, **part}
        for name, part in config.items()
        if isinstance(part, dict) and (name == key or part.get("model_type") == model_type)
    }
    return {**config, **parts}
