# SPDX-License-Identifier: MIT
"""`model.push_to_hub()` of a quantized model: with a card that says how to load it.

Transformers writes a card of its own for a repository that has none. It does not mention afpq, without which the
weights cannot be read, and there is no hook to give another: so the step that uploads is wrapped, for all models, and
does as before for those that are not ours. (Wrapping it in each model would tie the model to itself, and its memory
would outlive `del model`.)
"""

from __future__ import annotations

import shutil
from functools import wraps
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel

from afpq.checkpoint.card_header import LOAD, PAPER, card_metadata, front_matter
from afpq.checkpoint.quantization_config import QUANT_METHOD
from afpq.checkpoint.reader import CARD
from afpq.integrations.guarded_saves import guard_saved
from afpq.version import __version__

GENERATED = "This model card has been automatically generated."  # in the card that Transformers writes


def wrap_upload() -> None:
    """From now on our card goes to the hub with a model of ours; call once."""
    upload = getattr(PreTrainedModel, "_upload_modified_files", None)
    if upload is None:  # a private method; without it Transformers' own card is what goes
        return

    @wraps(upload)
    def with_card(self: PreTrainedModel, working_dir: Any, *arguments: Any, **options: Any) -> Any:
        if getattr(self, "hf_quantizer", None) is not None and self.quantization_method == QUANT_METHOD:
            _put_card(self, Path(working_dir))
            guard_saved(Path(working_dir))  # `save_pretrained(push_to_hub=True)` uploads before it returns
        return upload(self, working_dir, *arguments, **options)

    PreTrainedModel._upload_modified_files = with_card


def _put_card(model: PreTrainedModel, place: Path) -> None:
    """The card beside the files the model was loaded from, or a short one; a card that the repository has stays."""
    card, directory = place / CARD, model.hf_quantizer.directory
    if not card.exists() or GENERATED not in card.read_text("utf-8"):
        return
    ours, wanted = ModelCard(_card_of(model, directory)), metadata_load(card) or {}
    data: Any = ours.data
    data.tags = list(dict.fromkeys([*data.tags, *(wanted.get("tags") or [])]))
    ours.save(card)
    for path in directory.iterdir() if directory is not None else ():
        if path.is_file() and path.name in ours.text and not (place / path.name).exists():
            shutil.copyfile(path, place / path.name)  # its picture, and the log it refers to


def _card_of(model: PreTrainedModel, directory: Path | None) -> str:
    if directory is not None and {QUANT_METHOD, "quantized"} <= set(card_metadata(directory).get("tags") or []):
        return (directory / CARD).read_text("utf-8")
    recipe, _ = model.config.quantization_config.recipe()
    scheme, name = recipe.scheme, str(getattr(model, "name_or_path", "") or "model")
    hub = not Path(name).exists() and name.count("/") == 1
    tags = [QUANT_METHOD, "quantized", f"{scheme.format.bits}-bit", scheme.format.name.partition(":")[0], recipe.method]
    link = f"[{name}](https://huggingface.co/{name})" if hub else f"`{Path(name).name}`"
    return (
        f"{front_matter(name if hub else None, tags, directory)}\n"
        f"# {Path(name).name}, {scheme} by {recipe.method}\n\n"
        f"{link} with its weights in {scheme.format.bits} bits, quantized by afpq {__version__} "
        f"([asymmetric floating point]({PAPER})).\n\n## Load it\n\n{LOAD}\n"
    )
