# SPDX-License-Identifier: MIT
"""The entry point: the commands as processes, help, one clear line with exit code 2 for bad input, and signals."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from command_line import Cli, Result, assert_refused, finish, read_json, start, with_nan
from command_line import cli as cli  # the fixtures
from command_line import packed as packed
from command_line import text as text
from conftest import ModelMaker
from safetensors.torch import load_file, save_file

from afpq.checkpoint.reader import WEIGHTS

# ---- the commands


def test_quantize_eval_info_generate_as_processes(tiny_model_dir: Path, text: Path, tmp_path: Path) -> None:
    out, small = tmp_path / "out", ("--format", "nf3", "--group-size", "64", "--scale-dtype", "float16")
    quantized = finish(start("quantize", tiny_model_dir, out, *small, "--json", tmp_path / "q.json"))
    assert (quantized.code, quantized.err) == (0, ""), quantized.err
    assert str(out) in quantized.out and "nf3-asym-g64" in quantized.out and "3.533" in quantized.out
    reference = ("--reference", tiny_model_dir)
    evaluated = finish(start("eval", out, "--text", text, "--seq-len", "64", *reference, "--json", tmp_path / "e.json"))
    assert (evaluated.code, evaluated.err) == (0, ""), evaluated.err
    assert "perplexity" in evaluated.out and "KL" in evaluated.out
    told = finish(start("info", out, "--json", tmp_path / "i.json"))
    assert (told.code, told.err) == (0, ""), told.err
    assert "nf3-asym-g64" in told.out and "3.5333" in told.out
    continued = finish(start("generate", out, "The quick", "--max-new-tokens", "4"))
    assert (continued.code, continued.err) == (0, ""), continued.err
    assert continued.out.startswith("The quick") and len(continued.out) > len("The quick\n")

    made, measured, known = (read_json(tmp_path / f"{name}.json") for name in "qei")
    assert {"bits_per_weight", "coverage", "layers"} <= set(made)
    assert {"perplexity", "standard_error", "tokens", "kl_divergence", "top1_agreement"} <= set(measured)
    assert {
        "bits_per_weight", "coverage", "quantized_parameters", "total_parameters", "file_bytes", "layers",
    } <= set(known)  # fmt: skip
    assert made["bits_per_weight"] == known["bits_per_weight"] == pytest.approx(3.5333333)
    assert measured["kl_divergence"] > 0 and 0 <= measured["top1_agreement"] <= 1


@pytest.mark.parametrize("name", ["[red]v1", ":smile:", "a b", "x" * 120])
def test_names_are_printed_as_they_are(cli: Cli, tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / name)
    told = cli("info", tmp_path / name)
    assert told.code == 0 and f"/{name}\n" in told.out
    quantized = cli("quantize", tmp_path / name, tmp_path / f"{name}-out")
    assert quantized.code == 0 and f"/{name}-out:" in quantized.out
    assert_refused(cli("quantize", tmp_path / name, tmp_path / f"{name}-out"), f"/{name}-out: exists already")


def test_a_name_that_looks_like_a_closing_tag(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "a[" / "b]")
    assert "a[/b]\n" in cli("info", tmp_path / "a[" / "b]").out


def test_help_lists_the_commands(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert all(name in result.out for name in ("demo", "quantize", "inspect", "eval", "info", "generate"))
    alone = cli()
    assert "quantize" in alone.out + alone.err and "Traceback" not in alone.err


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate"]),
        (["quantize"], ["argument"]),
        (["quantize", "a"], ["argument"]),
        (["eval"], ["argument"]),
        (["info"], ["argument"]),
        (["generate"], ["argument"]),
        (["info", "/no/such/dir"], ["/no/such/dir"]),
        (["info", "nobody/nothing"], ["nobody/nothing"]),
        (["info", "a" * 300], ["a" * 50]),
        (["info", ""], ["config.json"]),
        (["eval", "/no/such/dir", "--text", __file__], ["/no/such/dir"]),
        (["generate", "/no/such/dir", "hello"], ["/no/such/dir"]),
        (["quantize", "/no/such/dir", "out"], ["/no/such/dir"]),
        (["quantize", __file__, "out"], ["config.json"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_arguments(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_broken_models_as_processes(tiny_copy: Path, packed: Path, tmp_path: Path) -> None:
    """Once for real: other libraries write to standard error too."""
    with_nan(tiny_copy)
    assert_refused(finish(start("quantize", tiny_copy, tmp_path / "out")), "up_proj", "NaN")
    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    tensors = load_file(broken / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, broken / WEIGHTS, {"format": "pt"})
    assert_refused(finish(start("generate", broken, "hello")), "up_proj.qweight")


def test_a_disk_that_is_full(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The system refuses files of more than 50 kB, in the middle of the weights."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = start(
        "quantize", tiny_model_dir, tmp_path / "out", env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    assert_refused(finish(process), str(tmp_path / "out"), "cannot write")
    assert list(tmp_path.iterdir()) == []


# ---- interrupted runs


@pytest.fixture(scope="module")
def larger(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose search for scales takes many seconds."""
    return make_model(
        tmp_path_factory.mktemp("larger") / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=24
    )


def stopped(larger: Path, out: Path, number: signal.Signals) -> Result:
    """Quantize, and send the signal when the first weights are being written."""
    process = start("quantize", larger, out, "--scale-search", "mse")
    partial = out.with_name(f"{out.name}.partial")
    while not list(partial.glob("*.safetensors")):
        assert process.poll() is None, finish(process)
        time.sleep(0.02)
    process.send_signal(number)
    return finish(process)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_an_interrupt_ends_with_its_code_and_no_output(
    larger: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    result = stopped(larger, tmp_path / "out", number)
    assert re.fullmatch(r"afpq: [^\n]+\n", result.err), result.err
    assert (result.code, result.out) == (code, "")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))


def test_a_killed_run_leaves_nothing_that_looks_finished(cli: Cli, larger: Path, tmp_path: Path) -> None:
    assert stopped(larger, tmp_path / "out", signal.SIGKILL).code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("config.json"))
    assert cli("info", tmp_path / "out.partial").code == 2
    # and is no obstacle to another try
    assert cli("quantize", larger, tmp_path / "out", "--no-resume").code == 0
    assert cli("info", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
