# SPDX-License-Identifier: MIT
"""Build a model's architecture on the meta device: module names and shapes, no memory for weights.

Every weight matrix in it is a linear: GPT-2's Conv1D is replaced by one, and fused experts are split.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from afpq.errors import AfpqError, one_line
from afpq.model.unfuse import unfuse

MAX_LAYERS = 10_000
_PATCH = threading.RLock()  # held while nn.Module.register_parameter is replaced


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter goes to the meta device as it is registered, before it is filled; buffers stay real.

    This replaces `nn.Module.register_parameter` for the whole process: skeletons are built one at a time, under a lock,
    but a model that another thread builds by other means meanwhile gets meta parameters too.
    """

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    with _PATCH:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the class that builds and loads the architecture that config.json names, or the Auto class for it.

    Encoders, encoder-decoders and bare models have no common Auto class. A config that names no architecture of
    Transformers counts as a causal language model; code of its own, if allowed, has the Auto class it is listed under.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    if trust_remote_code:
        listed = getattr(config, "auto_map", None) or {}
        auto = next((key for key, place in listed.items() if str(place).rpartition(".")[2] == name), None)
        if auto is not None and auto.startswith("AutoModel"):
            return getattr(transformers, auto)
    named = getattr(transformers, name, None)
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    return named if known else AutoModelForCausalLM


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """Read config.json with Transformers. Raises AfpqError if that fails, or for more layers than MAX_LAYERS."""
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    except Exception as error:  # foreign input: any class of Transformers may raise anything
        raise _cannot_build(directory, error) from None
    if isinstance(layers, int) and layers > MAX_LAYERS:  # building them one by one would not end
        raise AfpqError(f"{directory / 'config.json'}: num_hidden_layers is {layers}; {MAX_LAYERS} are the most")
    return config


def _cannot_build(directory: Path, error: Exception) -> AfpqError:
    reason = one_line(error, 300) or type(error).__name__
    return AfpqError(f"{directory}: Transformers cannot build this model: {reason}")


def build_skeleton(directory: Path, trust_remote_code: bool = False, original: bool = False) -> PreTrainedModel:
    """Build the architecture that config.json names, in evaluation mode: parameters on the meta device, buffers real.

    Buffers such as rotary frequencies are computed, not loaded, so the model needs them to run. With `original` all
    modules are the architecture's own, nothing is split, and buffers are in float32. Raises AfpqError for an
    architecture that Transformers lacks, or that needs code from the checkpoint that was not allowed.
    """
    config = read_config(directory, trust_remote_code)
    try:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if original:
            for part in (config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))):
                if part is not None:
                    part.dtype = torch.float32
        named = model_class(config, trust_remote_code)
        with _parameters_on_meta():
            model: PreTrainedModel = (
                named._from_config(config)
                if issubclass(named, PreTrainedModel)
                else named.from_config(config, trust_remote_code=trust_remote_code)
            )
        if not original:
            unfuse(model)
        return model.eval()
    except Exception as error:  # as above
        raise _cannot_build(directory, error) from None
