# SPDX-License-Identifier: MIT
"""The card of a converted checkpoint: where it came from, without a path of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from afpq import Recipe, parse_scheme
from afpq.checkpoint.card_header import card_metadata
from afpq.checkpoint.quantization_config import config_to_json
from afpq.checkpoint.reader import CARD, open_checkpoint
from afpq.jobs.conversion_card import Provenance, provenance_card, scheme_text


def provenance(directory: Path) -> Provenance:
    summary = "of the weights of {model}, written anew."
    return Provenance(str(directory), open_checkpoint(directory), "turned", summary, ("One fact.",), ("afpq", "x"))


def metadata(text: str, scratch: Path) -> dict[str, object]:
    (scratch / CARD).write_text(text)
    return card_metadata(scratch)


def test_a_directory_is_called_by_its_name_alone(tiny_copy: Path, tmp_path: Path) -> None:
    text = provenance_card(provenance(tiny_copy))
    assert "# model, turned\n" in text and "This is a checkpoint of the weights of `model`, written anew." in text
    assert "- One fact.\n" in text and str(tmp_path) not in text and "## Load it" not in text
    assert "base_model" not in metadata(text, tmp_path) and metadata(text, tmp_path)["tags"] == ["afpq", "x"]


def test_a_model_of_the_hub_is_linked_and_is_the_base(tiny_copy: Path, tmp_path: Path) -> None:
    text = provenance_card(replace(provenance(tiny_copy), model="someone/small", load="Just so."))
    assert "[someone/small](https://huggingface.co/someone/small)" in text and "## Load it\n\nJust so.\n" in text
    assert metadata(text, tmp_path)["base_model"] == "someone/small"


@pytest.mark.parametrize(("stated", "base"), [("some/base", "some/base"), ("[a, b]", None), ("''", None)])
def test_a_directory_keeps_the_base_that_its_own_card_names(
    tiny_copy: Path, tmp_path: Path, stated: str, base: str | None
) -> None:
    (tiny_copy / CARD).write_text(f"---\nbase_model: {stated}\nlicense: mit\n---\n")
    found = metadata(provenance_card(provenance(tiny_copy)), tmp_path)
    assert (found.get("base_model"), found["license"]) == (base, "mit")


def test_the_scheme_is_that_of_the_config() -> None:
    keys = config_to_json(Recipe(parse_scheme("nf3-sym-g32"), "gptq"), [])
    assert scheme_text({"quantization_config": keys}) == "nf3-sym-g32 by gptq"
