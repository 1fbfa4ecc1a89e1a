# SPDX-License-Identifier: MIT
"""Build a model's architecture on the meta device: module names and shapes without memory for weights.

Every weight matrix is a linear in it: GPT-2's Conv1D is replaced by one, and fused experts are taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from afpq.errors import AfpqError
from afpq.unfuse import unfuse


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter created inside goes to the meta device as it is registered, before it is filled."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(directory: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture that config.json names, in evaluation mode: parameters on the meta device, buffers real.

    Buffers such as rotary frequencies are computed, not loaded, so they must exist when the model is run.

    Raises AfpqError where Transformers does not know it, or it needs code from the checkpoint that was not allowed.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with _parameters_on_meta():
            if named is not None and hasattr(named, "_from_config"):
                model = named._from_config(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        unfuse(model)
        return model.eval()
    except Exception as error:  # a config is foreign input: any class of Transformers may stumble over it its own way
        reason = " ".join(str(error).split())
        raise AfpqError(f"{directory}: Transformers cannot build this model: {reason[:300]}") from None
