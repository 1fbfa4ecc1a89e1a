# SPDX-License-Identifier: MIT
"""The front matter of model cards: the base model, the tags, the original licence."""

from __future__ import annotations

from pathlib import Path

import pytest

from afpq.checkpoint.card_header import card_metadata, front_matter, licence_of
from afpq.checkpoint.reader import CARD


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("---\nlicense: mit\nother: 1\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: x\n---\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: {\n---\n", {}),
        ("---\njust words\n---\n", {}),
        ("no front matter", {}),
        (None, {}),
    ],
)
def test_the_licence_is_the_original_s(tmp_path: Path, content: str | None, found: dict[str, str]) -> None:
    if content is not None:
        (tmp_path / CARD).write_text(content)
    assert licence_of(tmp_path) == found


@pytest.mark.parametrize("base", [None, "someone/model"])
def test_front_matter_is_read_back_as_it_was_meant(tmp_path: Path, base: str | None) -> None:
    (tmp_path / CARD).write_text("---\nlicense: mit\nbase_model: not/this\n---\nwords")
    text = front_matter(base, ["afpq", "4-bit"], tmp_path)
    (tmp_path / CARD).write_text(text + "# The card\n")
    found = card_metadata(tmp_path)
    assert (found["tags"], found["license"], found.get("base_model")) == (["afpq", "4-bit"], "mit", base)
    assert (found.get("base_model_relation") == "quantized") is (base is not None)
