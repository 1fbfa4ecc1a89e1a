# SPDX-License-Identifier: MIT
"""`afpq export` and `afpq import` from the command line: there and back, and one clear line for what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from bnb_layout import Layout, convert
from command_line import Cli, assert_refused, finish, read_json, start
from command_line import cli as cli  # the fixture
from command_line import packed as packed
from safetensors.torch import load_file, save_file

from afpq.checkpoint.reader import WEIGHTS


def test_export_as_a_process(packed: Path, tmp_path: Path) -> None:
    done = finish(start("export", packed, tmp_path / "out", "--to", "bf16", "--json", tmp_path / "e.json"))
    assert (done.code, done.err) == (0, ""), done.err
    assert f"wrote {tmp_path / 'out'}" in done.out and "14 linears dequantized, everything in bfloat16" in done.out
    told = read_json(tmp_path / "e.json")
    assert (told["dtype"], told["layers"], told["kept"]) == ("bfloat16", 14, [])
    assert told["output_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / WEIGHTS).values())


def test_an_export_is_an_ordinary_model_for_the_other_commands(cli: Cli, packed: Path, tmp_path: Path) -> None:
    assert cli("export", packed, tmp_path / "out").code == 0
    told = cli("info", tmp_path / "out", "--json", tmp_path / "i.json")
    assert told.code == 0 and read_json(tmp_path / "i.json")["bits_per_weight"] == 16
    assert cli("quantize", tmp_path / "out", tmp_path / "again").code == 0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_import(cli: Cli, tiny_copy: Path, tmp_path: Path, kind: str) -> None:
    convert(tiny_copy, Layout(kind))
    done = cli("import", tiny_copy, tmp_path / "out", "--json", tmp_path / "i.json")
    assert (done.code, done.err) == (0, ""), done.err
    format = {"nf4": "nf4", "fp4": "lut"}[kind]
    bits = {"nf4": "4.300", "fp4": "4.314"}[kind]  # fp4's 15 values are written out
    assert f"14 linears of bitsandbytes {kind}, {bits} true bits per quantized weight (was 4.757)" in done.out
    assert f"12 linears as {format}-sym-g64\n2 linears as {format}-sym-g32\n" in done.out
    assert "all weights as they were" in done.out
    told = read_json(tmp_path / "i.json")
    assert told["exact"] and told["layers"] == 14 and sum(told["schemes"].values()) == 14
    assert cli("info", tmp_path / "out").code == 0


def test_bad_input_is_one_line(cli: Cli, packed: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(cli("export", packed, out, "--to", "fp8"), "fp8", "bf16, fp16, fp32")
    assert_refused(cli("export", tiny_model_dir, out), str(tiny_model_dir), "not quantized")
    assert_refused(cli("export", tmp_path / "nothing", out), "nothing")
    assert_refused(cli("export", packed, packed), "exists already")
    assert_refused(cli("export", packed, out, "--json", tmp_path), "JSON")
    assert_refused(cli("export", packed), "out")
    assert_refused(cli("import", tiny_model_dir, out), "not quantized")
    assert_refused(cli("import", packed, out), "'afpq'", "bitsandbytes")
    assert_refused(cli("import", packed, out, "--scale-dtype", "log8"), "log8")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_an_overflow_is_one_line_and_leaves_nothing(cli: Cli, packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"] = torch.full((64,), 1e6)
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert cli("export", copy, tmp_path / "kept", "--to", "fp16").code == 0  # wider than the rest: it stays
    tensors = {name: tensor if "proj" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert_refused(cli("export", copy, tmp_path / "out", "--to", "fp16"), "model.norm.weight", "too large for float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
