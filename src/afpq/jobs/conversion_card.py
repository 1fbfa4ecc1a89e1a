# SPDX-License-Identifier: MIT
"""The model card of a checkpoint that was converted from another, not quantized: what it is and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afpq.checkpoint.card_header import card_metadata, front_matter
from afpq.checkpoint.quantization_config import config_from_json
from afpq.checkpoint.reader import Checkpoint
from afpq.version import __version__


@dataclass(frozen=True)
class Provenance:
    """The origin of a converted model: `model` as the user named it, its checkpoint, and the card's texts.

    `title` follows the model's name; `summary` is a sentence that follows "This is a checkpoint", with {model} for a
    link; `facts` become a list; `load` describes how to load it, if that takes more than Transformers.
    """

    model: str
    checkpoint: Checkpoint
    title: str
    summary: str
    facts: tuple[str, ...]
    tags: tuple[str, ...]
    load: str = ""


def provenance_card(origin: Provenance) -> str:
    """Write the whole card, in Markdown; without a path of this machine."""
    local = Path(origin.model).is_dir()
    name = Path(origin.model).resolve().name if local else origin.model
    link = f"`{name}`" if local else f"[{name}](https://huggingface.co/{name})"
    facts = "\n".join(f"- {fact}" for fact in (*origin.facts, f"Made by afpq {__version__}."))
    summary = origin.summary.replace("{model}", link)
    load = f"\n## Load it\n\n{origin.load}\n" if origin.load else ""
    head = front_matter(_base_model(origin), list(origin.tags), origin.checkpoint.directory)
    return f"{head}\n# {name}, {origin.title}\n\nThis is a checkpoint {summary}\n\n{facts}\n{load}"


def scheme_text(config: dict[str, Any]) -> str:
    """Return such as `nf4-asym-g64-log8 by gptq`, from the config.json of a quantized model."""
    recipe, _ = config_from_json(config["quantization_config"])
    return f"{recipe.scheme} by {recipe.method}"


def _base_model(origin: Provenance) -> str | None:
    """Return the hub's id of the model converted, or else the one that its own card names."""
    if not Path(origin.model).is_dir():
        return origin.model
    found = card_metadata(origin.checkpoint.directory).get("base_model")
    return found if isinstance(found, str) and found else None
