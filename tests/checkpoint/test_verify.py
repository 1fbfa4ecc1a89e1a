# SPDX-License-Identifier: MIT
"""Checksums see every bit, and files that differ from what was computed are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import edit_config
from safetensors.torch import load_file, save_file
from small_models import plan_of
from torch import Tensor

from afpq import AfpqError, quantize
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import CARD, WEIGHTS, open_checkpoint
from afpq.checkpoint.verify import check_tensors, checkpoint_digest, digest

SCHEME = "nf3-asym-g64"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plan(tiny_model_dir: Path) -> Plan:
    return plan_of(tiny_model_dir, SCHEME)


@pytest.fixture
def out(tiny_model_dir: Path, tmp_path: Path) -> Path:
    quantize(tiny_model_dir, tmp_path / "out", SCHEME, evaluate=False)
    return tmp_path / "out"


def digests_of(directory: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in load_file(directory / WEIGHTS).items()}


def test_a_checksum_sees_every_bit() -> None:
    a = torch.tensor([0.0, float("nan"), 2.0])
    assert digest(a) == digest(a.clone()) and len(digest(a)) == 32
    assert digest(a) != digest(torch.tensor([-0.0, float("nan"), 2.0]))
    assert digest(torch.arange(6).view(2, 3).T) == digest(torch.arange(6).view(2, 3).T.contiguous())
    assert digest(torch.empty(0)) == digest(torch.empty(0, 3))


@pytest.mark.parametrize("name", [f"{UP}.qweight", f"{UP}.scales_neg", "model.norm.weight"])
def test_a_changed_tensor_is_named(out: Path, plan: Plan, name: str) -> None:
    digests, tensors = digests_of(out), load_file(out / WEIGHTS)
    tensors[name].view(-1).view(torch.uint8)[-1] ^= 1
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    with pytest.raises(AfpqError, match=f"{name} is not in the files as it was computed"):
        check_tensors(open_checkpoint(out), plan.outputs(), digests)


def test_missing_misshapen_and_unplanned_tensors_are_named(out: Path, plan: Plan) -> None:
    digests, whole = digests_of(out), load_file(out / WEIGHTS)
    name = f"{UP}.qweight"
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        ({name: None}, f"{name} is missing"),
        ({name: torch.zeros(3)}, f"{name} is torch.float32"),
        ({"extra": torch.zeros(3)}, "extra was written but not planned"),
    ]
    for change, message in changes:
        tensors = {key: value for key, value in {**whole, **change}.items() if value is not None}
        save_file(tensors, out / WEIGHTS, {"format": "pt"})
        with pytest.raises(AfpqError, match=message):
            check_tensors(open_checkpoint(out), plan.outputs(), digests)


def test_a_checkpoint_s_digest_follows_its_weights_and_config_only(tiny_copy: Path) -> None:
    def now() -> str:
        return checkpoint_digest(open_checkpoint(tiny_copy))

    first = now()
    (tiny_copy / CARD).write_text("other words")
    assert now() == first
    edit_config(tiny_copy, rms_norm_eps=1e-3)
    second = now()
    assert second != first
    stat = (tiny_copy / WEIGHTS).stat()
    os.utime(tiny_copy / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert now() not in (first, second)
