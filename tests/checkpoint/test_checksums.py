# SPDX-License-Identifier: MIT
"""Checksums of a result: whatever bit of its files changes, the tensor and the file are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layout import Layout, convert
from conftest import edit_config, save_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import afpq
from afpq.checkpoint.checksums import CHECKSUMS, DECIDING, config_digests, read_checksums, spec_text
from afpq.checkpoint.integrity import verify
from afpq.checkpoint.reader import INDEX, WEIGHTS, open_checkpoint
from afpq.checkpoint.verify import digest
from afpq.errors import AfpqError

damaging = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SKIP, OVERRIDE = ("o_proj",), (("down_proj", afpq.parse_scheme("int4-asym-g32")),)


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with packed tensors of all kinds, kept layers and an override, in one file."""
    out = tmp_path_factory.mktemp("sums") / "whole"
    afpq.quantize(tiny_model_dir, out, "nf3-asym-g64-log8", skip=SKIP, overrides=OVERRIDE, lm_head=True)
    return out


@pytest.fixture(scope="module")
def sharded(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files."""
    from afpq.checkpoint.writer import ShardWriter
    from afpq.jobs import execute

    out = tmp_path_factory.mktemp("sums") / "sharded"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "ShardWriter", lambda *a, **k: ShardWriter(*a, **{"max_shard": 40_000, **k}))
        afpq.quantize(tiny_model_dir, out, "nf3-asym-g64-log8", skip=SKIP, overrides=OVERRIDE, lm_head=True)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def found(directory: Path) -> list[tuple[str, str, str]]:
    return [(d.name, d.file, d.reason) for d in verify(directory).differences]


def data_offset(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_the_checksums_are_those_of_the_files(whole: Path) -> None:
    tensors, sums = load_file(whole / WEIGHTS), read_checksums(whole)
    assert sums.tensors == {name: digest(tensor) for name, tensor in tensors.items()}
    assert sums.specs == {name: spec_text((t.dtype, tuple(t.shape))) for name, t in tensors.items()}
    kinds = ("qweight", "scales_pos", "scales_neg", "scale_grid", "zeros", "scales", "norm.weight")
    assert all(any(name.endswith(kind) for name in tensors) for kind in kinds)
    result = verify(whole)
    assert result.intact and result.tensors == len(tensors)
    assert result.to_json() == {"intact": True, "tensors": len(tensors), "bytes": result.bytes, "differences": []}


def test_progress_ends_at_all_bytes(whole: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    verify(whole, lambda *step: seen.append(step))
    assert [name for name, _, _ in seen] == list(open_checkpoint(whole).tensors)
    assert seen[-1][1] == seen[-1][2] == verify(whole).bytes


@damaging
@given(data=st.data())
@pytest.mark.parametrize("kind", ["qweight", "scales_pos", "scales", "scale_grid", "zeros", "norm.weight", ""])
def test_a_flipped_bit_names_its_tensor(whole: Path, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    copy = tmp_path / "flipped"
    if not copy.exists():
        shutil.copytree(whole, copy)
    content = bytearray((whole / WEIGHTS).read_bytes())
    header = json.loads(content[8 : data_offset(content)])
    name = data.draw(st.sampled_from([n for n in header if n.endswith(kind) and n != "__metadata__"]))
    begin, end = header[name]["data_offsets"]
    bit = data.draw(st.integers(0, 8 * (end - begin) - 1))
    content[data_offset(content) + begin + bit // 8] ^= 1 << bit % 8
    (copy / WEIGHTS).write_bytes(content)
    assert found(copy) == [(f"tensor {name}", WEIGHTS, "is not as it was written")]


@damaging
@given(data=st.data())
def test_a_truncated_shard_is_an_error_that_names_it(sharded: Path, tmp_path: Path, data: st.DataObject) -> None:
    copy = tmp_path / "truncated"
    if not copy.exists():
        shutil.copytree(sharded, copy)
    shard = data.draw(st.sampled_from(sorted(path.name for path in sharded.glob("*.safetensors"))))
    content = (sharded / shard).read_bytes()
    (copy / shard).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(AfpqError, match=shard):
        verify(copy)
    (copy / shard).write_bytes(content)
    assert verify(copy).intact


def test_swapped_shards_are_found(shards: Path) -> None:
    """Each tensor still has its value, but readers that go by the index look into the wrong file."""
    one, two = sorted(shards.glob("*.safetensors"))[:2]
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    names = {name for name, file in index.items() if file in (one.name, two.name)}
    assert {name for name, _, _ in found(shards)} == {f"tensor {name}" for name in names}
    assert all(INDEX in reason for _, _, reason in found(shards))


def test_a_shard_of_another_model_is_found(shards: Path, make_model: Callable[..., Path], tmp_path: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, shard, {"format": "pt"})
    changed = {f"tensor {name}" for name, tensor in tensors.items() if not torch.equal(tensor, tensor.flip(0))}
    assert {(name, file) for name, file, _ in found(shards)} == {(name, shard.name) for name in changed}


def test_the_files_of_another_model_are_said_to_be_that(copied: Path, tmp_path: Path) -> None:
    """Norms of fresh models are all ones, so these have other ones."""
    other = save_llama(tmp_path / "other", seed=5)
    tensors = load_file(other / WEIGHTS)
    save_file({n: t * 1.5 if "norm" in n else t for n, t in tensors.items()}, other / WEIGHTS, {"format": "pt"})
    afpq.quantize(other, tmp_path / "out", "nf3-asym-g64-log8", skip=SKIP, overrides=OVERRIDE, lm_head=True)
    sums = copied / CHECKSUMS
    shutil.copyfile(sums, tmp_path / "out" / CHECKSUMS)
    assert "another model" in found(tmp_path / "out")[0][2]


CONFIG: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("format", lambda keys: keys.update(format="int3")),
    ("group_size", lambda keys: keys.update(group_size=32)),
    ("sym", lambda keys: keys.update(sym=True)),
    ("scale_dtype", lambda keys: keys.update(scale_dtype="float16")),
    ("bits", lambda keys: keys.update(bits=4)),
    ("version", lambda keys: keys.update(version=2)),
    ("dynamic", lambda keys: keys["dynamic"].clear()),
    ("dynamic", lambda keys: next(iter(keys["dynamic"].values())).update(group_size=64)),
    ("lm_head", lambda keys: keys.pop("lm_head")),
    ("lm_head", lambda keys: keys["lm_head"].update(format="int3")),
    ("embedding", lambda keys: keys.update(embedding=keys["lm_head"])),
    ("modules_to_not_convert", lambda keys: keys["modules_to_not_convert"].pop()),
    ("modules_to_not_convert", lambda keys: keys["modules_to_not_convert"].append("model.layers.0.mlp.up_proj")),
]


@pytest.mark.parametrize(("key", "change"), CONFIG)
def test_a_key_of_the_config_that_decides_values_is_named(
    copied: Path, key: str, change: Callable[[dict[str, Any]], object]
) -> None:
    keys = json.loads((copied / "config.json").read_text())["quantization_config"]
    change(keys)
    edit_config(copied, quantization_config=keys)
    assert [(name, file) for name, file, _ in found(copied)] == [(f"quantization_config.{key}", "config.json")]


def test_every_key_that_decides_is_tried_above() -> None:
    assert {key for key, _ in CONFIG} == set(DECIDING) - {"quant_method"}


def test_a_config_that_is_gone_and_a_record_that_changed(copied: Path) -> None:
    keys = json.loads((copied / "config.json").read_text())["quantization_config"]
    edit_config(copied, quantization_config={**keys, "made_by": "someone", "sweeps": 99})
    assert verify(copied).intact
    edit_config(copied, quantization_config=None)
    gone = {name for name, _, reason in found(copied) if reason == "is missing"}
    assert gone == {f"quantization_config.{key}" for key in config_digests({"quantization_config": keys})}


def test_missing_extra_and_misshapen_tensors_are_named(copied: Path) -> None:
    tensors = load_file(copied / WEIGHTS)
    codes = tensors.pop("model.layers.0.mlp.up_proj.qweight")
    tensors["extra"] = codes
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = norm.view(torch.bfloat16)  # the same bytes
    grid = "model.layers.1.mlp.up_proj.scale_grid"
    tensors[grid] = tensors[grid].reshape(1, -1)
    save_file(tensors, copied / WEIGHTS, {"format": "pt"})
    assert set(found(copied)) == {
        ("tensor model.layers.0.mlp.up_proj.qweight", CHECKSUMS, "was written, and is missing"),
        ("tensor extra", WEIGHTS, "is there, and was not written"),
        ("tensor model.norm.weight", WEIGHTS, "is bfloat16 64, was written as float16 64"),
        (f"tensor {grid}", WEIGHTS, "is float32 1x2, was written as float32 2"),
    }


def test_imported_and_exported_models_have_checksums(tiny_copy: Path, whole: Path, tmp_path: Path) -> None:
    convert(tiny_copy, Layout())
    afpq.import_model(tiny_copy, tmp_path / "imported")
    assert verify(tmp_path / "imported").intact and read_checksums(tmp_path / "imported").config
    afpq.export(whole, tmp_path / "exported")
    assert verify(tmp_path / "exported").intact and not read_checksums(tmp_path / "exported").config
    afpq.quantize(tmp_path / "exported", tmp_path / "again")  # which had a file of its own to copy
    assert verify(tmp_path / "again").intact


def test_an_end_pass_and_a_resumed_run_have_the_checksums_of_the_end(tiny_model_dir: Path, tmp_path: Path) -> None:
    text = "".join(chr(97 + i * i % 26) for i in range(2000))
    calibration = afpq.CalibrationSettings(samples=4, seq_len=32)
    afpq.quantize(tiny_model_dir, tmp_path / "out", text=text, settings=calibration, end_pass=2, evaluate=False)
    assert verify(tmp_path / "out").intact


def test_what_transformers_saves_has_no_checksums_and_a_stale_file_does_not_lie(copied: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied, dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(AfpqError, match=f"has no {CHECKSUMS}"):
        verify(tmp_path / "saved")
    model.save_pretrained(copied)
    assert verify(copied).intact  # the same numbers, and that is what the file claims
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(copied)
    assert found(copied) == [("tensor model.norm.weight", WEIGHTS, "is not as it was written")]
    wide = AutoModelForCausalLM.from_pretrained(copied, dtype=torch.float32)
    wide.save_pretrained(copied)
    assert ("tensor model.norm.weight", WEIGHTS, "is float32 64, was written as float16 64") in found(copied)


DAMAGED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("version", lambda c: c.update(version=2), "version 2"),
    ("algorithm", lambda c: c.update(algorithm="md5"), "md5"),
    ("no tensors", lambda c: c.pop("tensors"), "tensors must be"),
    ("a list", lambda c: c.update(specs=[]), "specs must be"),
    ("a number", lambda c: c["tensors"].update({"model.norm.weight": 3}), "tensors must be"),
    ("no digest", lambda c: c["tensors"].update({"model.norm.weight": "x"}), "damaged"),
    ("one name less", lambda c: c["specs"].pop("model.norm.weight"), "damaged"),
]


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_a_damaged_file_of_checksums_is_an_error(
    copied: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    content = json.loads((copied / CHECKSUMS).read_text())
    change(content)
    (copied / CHECKSUMS).write_text(json.dumps(content))
    with pytest.raises(AfpqError, match=words):
        verify(copied)
