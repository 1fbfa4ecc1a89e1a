# SPDX-License-Identifier: MIT
"""Tensors that a quantized checkpoint lacks: an error where Transformers would fill them with random numbers.

What is quantized is looked up in the headers before loading (`locate.check_headers`). This is about the rest: norms,
embeddings, the head, layers that were kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from afpq.checkpoint.locate import TensorLookup
from afpq.errors import AfpqError, in_all
from afpq.model.linear import PackedModule


def absent_tensors(model: PreTrainedModel, located: TensorLookup) -> list[str]:
    """The names of the model's tensors, except packed ones, that the checkpoint's headers do not have."""
    packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedModule))
    return [name for name in model.state_dict() if not name.startswith(packed) and located.find(name) is None]


def check_missing(model: PreTrainedModel, absent: Iterable[str]) -> None:
    """Raises AfpqError naming a tensor among `absent` that was not loaded, though the saved architecture has it.

    Of what is absent by name, Transformers may have made some from other tensors, or tied it to one; those have its
    mark of a value that was loaded. What the saved class (`architectures` in config.json) does not have, such as the
    head of a new task, is left as Transformers made it, with its warning.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [name for name in absent if not _loaded(model, name) and not any(re.search(p, name) for p in ignored)]
    if not missing:
        return
    saved, prefix = _saved_names(model), model.base_model_prefix
    own = [
        name for name in missing if not saved.isdisjoint((name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")))
    ]
    if own:
        raise AfpqError(
            f"tensor {own[0]} is not in the checkpoint{in_all(len(own), 'tensor')}; its files or its config are "
            "incomplete"
        )


def _loaded(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor has Transformers' mark; one that is offloaded has lost it, and counts as loaded."""
    tensor = model.get_parameter_or_buffer(name)
    return tensor.device.type == "meta" or bool(getattr(tensor, "_is_hf_initialized", False))


def _saved_names(model: PreTrainedModel) -> frozenset[str]:
    """The tensors of the class that was saved; of a class that is not Transformers' own, those of the model's base."""
    architecture, config = (getattr(model.config, "architectures", None) or [""])[0], model.config
    if architecture == type(model).__name__:
        return frozenset(model.state_dict())
    named: Any = getattr(transformers, architecture, None)
    known = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if not known or named.config_class is None or not isinstance(config, named.config_class):
        return frozenset(name for name in model.state_dict() if name.startswith(f"{model.base_model_prefix}."))
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        saved = named._from_config(config)
    return frozenset(saved.state_dict()) - set(getattr(saved, "all_tied_weights_keys", None) or ())  # not in its files
