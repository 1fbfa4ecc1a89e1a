# SPDX-License-Identifier: MIT
"""`afpq inspect` from the command line: tables, JSON, and one clear line for bad options."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Cli, assert_refused, finish, read_json, start
from command_line import cli as cli  # the fixture
from command_line import packed as packed
from conftest import ModelMaker


def test_inspect_as_a_process(tiny_model_dir: Path, tmp_path: Path) -> None:
    done = finish(start("inspect", tiny_model_dir, "--group-size", "32", "--json", tmp_path / "i.json"))
    assert (done.code, done.err) == (0, "")
    assert "14 of 14 linears" in done.out and "self_attn.q_proj" in done.out
    assert "  layers.0.mlp" not in done.out
    assert "4 bits" in done.out and "3 bits" in done.out and "errors of the weights" in done.out
    assert max(map(len, done.out.splitlines()[1:])) <= 80
    found = read_json(tmp_path / "i.json")
    assert found["schemes"]["nf4-asym-g32"]["bits"] == 5 and len(found["layers"]) == 14
    assert found["recommendations"]["3"] in " ".join(done.out.split())


def test_inspect_of_some_layers_each_on_a_line(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    some = ("--bits", "2", "--layers", "5", "--rows", "7", "--all", "--json", tmp_path / "i.json")
    result = cli("inspect", tiny_model_dir, *some)
    assert (result.code, result.err) == (0, "")
    found = read_json(tmp_path / "i.json")
    assert [layer["rows"] for layer in found["layers"]] == [7] * 5 and found["settings"]["bits"] == [2]
    assert all(layer["name"].removeprefix("model.layers.") in result.out for layer in found["layers"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--bits", "8"], "bits 8"),
        (["--bits", "four"], "--bits"),
        (["--group-size", "-1"], "group size -1"),
        (["--layers", "some"], "'some'"),
        (["--layers", "0"], "layer"),
        (["--rows", "0"], "row"),
        (["--scale-search", "luck"], "luck"),
        (["--json", "/no/such/dir/a.json"], "/no/such/dir"),
    ],
)
def test_bad_options_of_inspect(cli: Cli, tiny_model_dir: Path, options: list[str], word: str) -> None:
    assert_refused(cli("inspect", tiny_model_dir, *options), word)


def test_inspect_of_a_model_that_is_quantized_already(cli: Cli, packed: Path) -> None:
    assert_refused(cli("inspect", packed), "already quantized")


def test_the_column_of_the_gain_states_bits_that_differ(cli: Cli, make_model: ModelMaker, tmp_path: Path) -> None:
    narrow = make_model(tmp_path / "narrow", hidden_size=96, intermediate_size=96)
    different = cli("inspect", narrow, "--group-size", "64", "--bits", "4").out
    assert "equal bits" not in different and "against" in different
    assert max(map(len, different.splitlines()[1:])) <= 80
    assert "equal bits" in cli("inspect", narrow, "--group-size", "32", "--bits", "4").out
