# SPDX-License-Identifier: MIT
"""Weights for Transformers of a model published in a low precision, decoded here.

Transformers would decode fp8, MXFP4 and GGUF too, but each with a package or a GPU of its own; this needs neither, and
the model compared with is the one that was quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afpq.checkpoint.reader import Checkpoint


def decoded_weights(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` in place of a directory: all tensors, floats in `dtype` unless it is None.

    `config` is Transformers' object of the model's config.json; it loses its quantization_config.
    """
    if hasattr(config, "quantization_config"):
        del config.quantization_config

    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    weights = {name: read(name) for name in checkpoint.tensors}
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights}
