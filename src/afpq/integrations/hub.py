# SPDX-License-Identifier: MIT
"""Add a card that states how to load the model to `model.push_to_hub()` of a quantized model.

Transformers writes a generic card for a repository that has none. It does not mention afpq, which the weights need to
be read, and there is no hook for another card: so the upload step is wrapped, for all models, and unchanged for those
that are not ours. (Wrapping it in each model would make a reference cycle, and memory would outlive `del model`.)
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
    """Wrap the upload so that a quantized model goes to the hub with our card; call once."""
    upload = getattr(PreTrainedModel, "_upload_modified_files", None)
    if upload is None:  # a private method; without it Transformers' own card is uploaded
        return

    @wraps(upload)
    def with_card(self: PreTrainedModel, working_dir: Any, *arguments: Any, **options: Any) -> Any:
        if getattr(self, "hf_quantizer", None) is not None and self.quantization_method == QUANT_METHOD:
            _put_card(self, Path(working_dir))
            guard_saved(Path(working_dir))  # `save_pretrained(push_to_hub=True)` uploads before it returns
        return upload(self, working_dir, *arguments, **options)

    PreTrainedModel._upload_modified_files = with_card


def _put_card(model: PreTrainedModel, place: Path) -> None:
    """Write the card of the directory the model was loaded from, or a short one; a repository's own card stays."""
    card, directory = place / CARD, model.hf_quantizer.directory
    if not card.exists() or GENERATED not in card.read_text("utf-8"):
        return
    ours, wanted = ModelCard(_card_of(model, directory)), metadata_load(card) or {}
    data: Any = ours.data
    data.tags = list(dict.fromkeys([*data.tags, *(wanted.get("tags") or [])]))
    ours.save(card)
    for path in directory.iterdir() if directory is not None else ():
        if path.is_file() and path.name in ours.text and not (place / path.name).exists():
            shutil.copyfile(path, place / path.name)  # the card's picture, and the log it refers to


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
