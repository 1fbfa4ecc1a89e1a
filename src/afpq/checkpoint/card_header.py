# SPDX-License-Identifier: MIT
"""What all model cards of ours have in common: the front matter of the hub, the licence, and how to load the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from afpq.checkpoint.reader import CARD

PAPER = "https://arxiv.org/abs/2311.01792"
LICENCE_KEYS = ("license", "license_name", "license_link")

LOAD = """```python
import afpq  # pip install afpq: registers the format with Transformers, which could not read the weights without it
from transformers import AutoModelForCausalLM, AutoTokenizer

directory = "path/to/this/directory"  # or its id on the hub
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
```

```sh
afpq generate path/to/this/directory "Once upon a time"
afpq info path/to/this/directory
afpq eval path/to/this/directory --text test.txt
```"""


def front_matter(base_model: str | None, tags: list[str], directory: Path | None) -> str:
    """Write the YAML between its lines, for the hub; the licence is that of the card in `directory`.

    Only ids of the hub are a base model: a directory's name is not the id of anything.
    """
    keys: dict[str, Any] = {
        **({"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **(licence_of(directory) if directory is not None else {}),
    }
    text: str = ModelCardData(**keys).to_yaml()
    return f"---\n{text.strip()}\n---\n"


def card_metadata(directory: Path) -> dict[str, Any]:
    """Read the front matter of a model's own card; empty if there is no card that can be read."""
    try:
        metadata = metadata_load(directory / CARD)
    except Exception:  # no file, no UTF-8, or whatever the YAML parser makes of foreign text
        return {}
    return metadata or {}


def licence_of(directory: Path) -> dict[str, str]:
    """Return the licence keys in the front matter of a model's own card; empty if it has none."""
    metadata = card_metadata(directory)
    found = {key: metadata.get(key) for key in LICENCE_KEYS}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}
