# SPDX-License-Identifier: MIT
"""The key of config.json that stops Transformers without afpq, which would fill quantized layers with random numbers.

Transformers only warns of a `quant_method` that nobody registered, and loads on. `transformers_weights`, the name of
the weight file, is read after the quantizer was chosen, and in every 5.x a value that is not the name of a safetensors
file is a ValueError that quotes it. So it holds a sentence for the reader of that error; the plug-in removes it first.
"""

from __future__ import annotations

from typing import Any

GUARD_KEY = "transformers_weights"
GUARD = "afpq: the weights are quantized; `pip install -U afpq`, and `import afpq` before this model is loaded"
# Configs that a loader may take in place of the whole one: AutoModelForCausalLM reads a multimodal model's text part.
PARTS = ("text_config",)


def guarded(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a quantized model -> the same with the key, also in its text part."""
    parts = {part: {**config[part], GUARD_KEY: GUARD} for part in PARTS if isinstance(config.get(part), dict)}
    return {**config, **parts, GUARD_KEY: GUARD}


def unguarded(config: dict[str, Any]) -> dict[str, Any]:
    """The same without the key; one that names a file stays."""
    parts = {part: unguarded(config[part]) for part in PARTS if isinstance(config.get(part), dict)}
    return {key: value for key, value in {**config, **parts}.items() if key != GUARD_KEY or not is_guard(value)}


def lift_guard(config: Any) -> None:
    """Remove the key from a loaded config and its text part, in place, so that Transformers finds the weights."""
    for each in (config, *(getattr(config, part, None) for part in PARTS)):
        if is_guard(getattr(each, GUARD_KEY, None)):
            delattr(each, GUARD_KEY)


def is_guard(value: object) -> bool:
    """Whether a value of the key is the sentence, of this or another version, and not the name of a file."""
    return isinstance(value, str) and value.startswith("afpq: ") and "import afpq" in value
