# SPDX-License-Identifier: MIT
"""Quantizing while loading equals quantizing beforehand; what cannot be quantized is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import edit_weights
from loaded_models import CONFIGS, UP, WEIGHTS, load, logits, schemes_of
from loaded_models import saved as saved  # the fixture
from safetensors.torch import load_file

from afpq import AfpqConfig, AfpqError, quantize


@pytest.mark.parametrize(("scheme", "keys"), CONFIGS, ids=[scheme for scheme, _ in CONFIGS])
def test_quantizing_on_load_equals_quantizing_beforehand(
    tiny_model_dir: Path, tmp_path: Path, scheme: str, keys: dict[str, Any]
) -> None:
    quantize(tiny_model_dir, tmp_path / "out", scheme)
    on_load = load(tiny_model_dir, quantization_config=AfpqConfig(**keys))
    before = load(tmp_path / "out")
    assert set(schemes_of(on_load).values()) == {scheme}
    assert schemes_of(on_load) == schemes_of(before)
    assert torch.equal(logits(on_load), logits(before))


def test_both_ways_save_the_same_tensors_and_config(tiny_model_dir: Path, saved: Path, tmp_path: Path) -> None:
    config = AfpqConfig(format="nf3", group_size=64, scale_dtype="float16")
    load(tiny_model_dir, dtype=torch.float16, quantization_config=config).save_pretrained(tmp_path / "on_load")
    ours, theirs = load_file(saved / WEIGHTS), load_file(tmp_path / "on_load" / WEIGHTS)
    assert set(ours) == set(theirs)
    assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)
    keys = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (saved, tmp_path / "on_load")]
    keys[0].pop("made_by", None)
    assert keys[0] == keys[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unusable_weight_on_load_is_named(tiny_copy: Path, value: float) -> None:
    edit_weights(tiny_copy, lambda t: t[f"{UP}.weight"][3].fill_(value))
    with pytest.raises(AfpqError, match=rf"{UP}\.weight.*NaN or Inf"):
        load(tiny_copy, quantization_config=AfpqConfig(bits=4))


def test_a_missing_weight_on_load_is_named(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, lambda t: t.pop(f"{UP}.weight"))
    with pytest.raises(AfpqError, match=rf"{UP}\.weight"):
        load(tiny_copy, quantization_config=AfpqConfig(bits=4))
