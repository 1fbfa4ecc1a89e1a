# SPDX-License-Identifier: MIT
"""`model.save_pretrained()` of a quantized model: its config.json gets the key that stops loaders without afpq.

Transformers drops the key when it saves a config, and calls nothing of a quantizer behind that: so `save_pretrained`
is wrapped, for all models, and does as before for those that are not ours. If the wrapping ever fails to reach a
class, its saved models load as they did before there was the key.
"""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from afpq.checkpoint.atomic_files import write_json
from afpq.checkpoint.quantization_config import QUANT_METHOD
from afpq.checkpoint.reader import read_json
from afpq.checkpoint.unaware_loaders import guarded


def wrap_save() -> None:
    """From now on a model of ours is saved with the key; call once."""
    save = PreTrainedModel.save_pretrained

    @wraps(save)
    def with_guard(self: PreTrainedModel, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        result = save(self, save_directory, *arguments, **options)
        if getattr(self, "hf_quantizer", None) is not None and self.quantization_method == QUANT_METHOD:
            guard_saved(Path(save_directory))
        return result

    PreTrainedModel.save_pretrained = with_guard


def guard_saved(directory: Path) -> None:
    """Put the key into the config.json of `directory`, if that is there and of a model quantized by afpq.

    Raises AfpqError if the file is not JSON, and OSError if it cannot be written.
    """
    path = directory / "config.json"
    if not path.is_file():  # adapters are saved without one
        return
    config = read_json(path)
    keys = config.get("quantization_config")
    if isinstance(keys, dict) and keys.get("quant_method") == QUANT_METHOD and config != guarded(config):
        write_json(path, guarded(config))
