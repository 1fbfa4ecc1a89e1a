# SPDX-License-Identifier: MIT
"""Old names of modules: what the documentation showed before still imports, and says what it is called now."""

from __future__ import annotations

import importlib
import sys

import pytest

from afpq.moved import MOVED

SHOWN = {  # by pages of earlier versions
    "blocks": ("find_linears", "replace_module"),
    "convert": ("quantize_model",),
    "data": ("read_text", "tokenize", "windows"),
    "evaluate": ("evaluate", "logits_of"),
    "folds": ("folds_of",),
    "groups": ("GroupScales", "QuantizedWeight", "encode"),
    "integrations.lm_eval": ("TaskOptions", "run_tasks"),
    "job": ("Job", "prepare"),
    "kernels.packed": ("Packed",),
    "linear": ("AfpqLinear",),
    "loading": ("load_model", "load_tokenizer"),
    "packing": ("pack", "to_tensors", "unpack"),
    "scales": ("from_bytes",),
    "scheme": ("METHODS", "GptqOptions", "Recipe", "parse_scheme"),
    "source": ("open_checkpoint",),
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_works_and_warns(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"afpq.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"afpq\.{old} is now afpq\.{MOVED[old][0]}.*0\.3"):
        module = importlib.import_module(f"afpq.{old}")
    for name in SHOWN.get(old, ()):
        new = next(
            found for place in MOVED[old] if (found := getattr(importlib.import_module(f"afpq.{place}"), name, None))
        )
        assert getattr(module, name) is new


def test_the_warning_names_the_line_that_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "afpq.scales", raising=False)
    with pytest.warns(DeprecationWarning) as warned:
        import afpq.scales  # type: ignore[import-not-found]  # noqa: F401
    assert warned[0].filename == __file__


def test_other_names_are_not_there() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"afpq\.nothing"):
        importlib.import_module("afpq.nothing")
