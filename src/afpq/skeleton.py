# SPDX-License-Identifier: MIT
"""Build a model's architecture on the meta device: module names and shapes without memory for weights."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from afpq.errors import AfpqError


def build_skeleton(directory: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture that config.json names, on the meta device.

    Raises AfpqError where Transformers does not know it, or it needs code from the checkpoint that was not allowed.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if named is not None and hasattr(named, "_from_config"):
                return named._from_config(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise AfpqError(f"{directory}: Transformers cannot build this model: {reason[:300]}") from None
