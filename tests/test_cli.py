# SPDX-License-Identifier: MIT
"""The command line: what the commands do end to end, and one clear line with exit code 2 for every bad input."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Cli, Result, assert_refused, finish, read_json, start
from command_line import cli as cli  # the fixtures
from command_line import packed as packed
from command_line import text as text
from conftest import ModelMaker, edit_config
from safetensors.torch import load_file, save_file

import afpq
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


def test_quantize_writes_what_the_library_writes(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = (
        "--format", "nf4", "--group-size", "32", "--sym", "--scale-search", "mse", "--scale-dtype", "float16",
        "--skip", r"layers\.0\..*q_proj", "--skip", "gate", "--override", "down_proj=nf3-asym-g64",
    )  # fmt: skip
    assert cli("quantize", tiny_model_dir, tmp_path / "a", *arguments).code == 0
    afpq.quantize(
        tiny_model_dir, tmp_path / "b", "nf4-sym-g32", scale_search="mse",
        skip=(r"layers\.0\..*q_proj", "gate"), overrides=(("down_proj", afpq.parse_scheme("nf3-asym-g64")),),
    )  # fmt: skip
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_pattern_may_hold_an_equals_sign(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = cli("quantize", tiny_model_dir, tmp_path / "out", "--override", "(?=.*up_proj)=int8-sym-g32")
    assert result.code == 0
    assert cli("info", tmp_path / "out", "--json", tmp_path / "i.json").code == 0
    schemes = {layer["name"]: layer["scheme"] for layer in read_json(tmp_path / "i.json")["layers"]}
    assert {name for name, scheme in schemes.items() if scheme == "int8-sym-g32"} == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_a_dry_run_writes_nothing_and_tells_the_size(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = cli("quantize", tiny_model_dir, tmp_path / "out", "--dry-run", "--json", tmp_path / "q.json")
    assert (result.code, result.err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["q.json"]
    planned = read_json(tmp_path / "q.json")
    assert cli("quantize", tiny_model_dir, tmp_path / "out").code == 0
    assert planned["output_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / WEIGHTS).values())


def test_a_budget_is_shown_saved_and_measured_once(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = ["--bits-per-weight", "3.5", "--candidates", "nf3-asym-g64-log8,nf4-asym-g64-log8,nf2-asym-g64-log8"]
    options = [*budget, "--text", text, "--samples", "4", "--seq-len", "32", "--json", tmp_path / "plan.json"]
    dry = cli("quantize", tiny_model_dir, tmp_path / "out", *options, "--dry-run")
    assert dry.code == 0, dry
    assert "chosen for at most 3.5 bits per weight" in dry.out and "gate_proj" in dry.out
    told = read_json(tmp_path / "plan.json")
    assert 3.3 < told["bits_per_weight"] <= 3.5 == told["budget"]["bits_per_weight"]
    assert sum(scheme["layers"] for scheme in told["budget"]["schemes"]) == 14 == len(told["layers"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.sensitivities.json", "plan.json", "text.txt"]
    monkeypatch.setattr("afpq.jobs.bit_budget.measure_losses", lambda *_: pytest.fail("measured again"))
    assert cli("quantize", tiny_model_dir, tmp_path / "out", *options).code == 0
    assert read_json(tmp_path / "plan.json")["layers"] == told["layers"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json", "text.txt"]


def test_low_coverage_is_warned_of_and_what_is_left_is_named(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    dry = cli("quantize", tiny_model_dir, tmp_path / "out", "--skip", "mlp", "--dry-run")
    done = cli("quantize", tiny_model_dir, tmp_path / "out", "--skip", "mlp", "--json", tmp_path / "q.json")
    info = cli("info", tmp_path / "out", "--json", tmp_path / "i.json")
    for result in (dry, done, info):
        assert result.code == 0
        assert "warning" in result.err and "40.0 %" in result.err and "36,864 weights" in result.err
        assert "model.layers.*.mlp.down_proj.weight (12,288)" in result.err
    left = {f"model.layers.*.mlp.{name}_proj.weight": 12288 for name in ("gate", "up", "down")}
    assert read_json(tmp_path / "q.json")["left"] == read_json(tmp_path / "i.json")["left"] == left
    assert cli("info", tiny_model_dir).err == ""


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

QUANTIZE: dict[str, tuple[list[str], list[str]]] = {
    "unknown format": (["--format", "nf9"], ["nf9", "nf4"]),
    "bad custom format": (["--format", "lut:1:x"], ["lut:1:x"]),
    "group size 0": (["--group-size", "0"], ["0"]),
    "group size -2": (["--group-size", "-2"], ["-2"]),
    "group size of letters": (["--group-size", "many"], ["--group-size"]),
    "unknown method": (["--method", "magic"], ["magic", "rtn"]),
    "unknown search": (["--scale-search", "luck"], ["luck", "absmax"]),
    "bad regex": (["--skip", "("], ["(", "regular expression"]),
    "override without scheme": (["--override", "q_proj"], ["q_proj", "REGEX=SCHEME"]),
    "override without regex": (["--override", "=nf4-asym-g64"], ["REGEX=SCHEME"]),
    "override of an unknown format": (["--override", "q_proj=nf9-asym-g64"], ["nf9"]),
    "override of no scheme": (["--override", "q_proj=nf4"], ["nf4"]),
    "override with a bad regex": (["--override", "*=nf4-asym-g64"], ["regular expression"]),
    "nothing left": (["--skip", "."], ["skip"]),
    "unknown option": (["--frobnicate"], ["--frobnicate"]),
    "option without value": (["--format"], ["--format"]),
    "one argument too many": (["third"], ["third"]),
    "method without text": (["--method", "gptq"], ["text"]),
    "text that is missing": (["--method", "gptq", "--text", "/no/such.txt"], ["/no/such.txt"]),
    "no samples": (["--method", "gptq", "--text", "TEXT", "--samples", "0"], ["sample"]),
    "windows too short": (["--method", "gptq", "--text", "TEXT", "--seq-len", "1"], ["token"]),
    "samples of letters": (["--method", "gptq", "--text", "TEXT", "--samples", "many"], ["--samples"]),
    "a seed too large": (["--method", "gptq", "--text", "TEXT", "--seed", "9" * 30], ["seed"]),
    "unknown device": (["--method", "gptq", "--text", "TEXT", "--device", "abacus"], ["abacus"]),
    "damp too large": (["--method", "gptq", "--text", "TEXT", "--damp", "2"], ["damp"]),
    "unknown order": (["--method", "gptq", "--text", "TEXT", "--order", "random"], ["random"]),
    "a budget without text": (["--bits-per-weight", "3.5"], ["budget", "text"]),
    "a budget below the cheapest": (["--bits-per-weight", "2", "--text", "TEXT"], ["weight 2:", "2.28"]),
    "a budget above the dearest": (["--bits-per-weight", "5", "--text", "TEXT"], ["weight 5:", "4.51"]),
    "a budget of letters": (["--bits-per-weight", "few", "--text", "TEXT"], ["--bits-per-weight"]),
    "candidates without a budget": (["--candidates", "nf3-asym-g64"], ["--bits-per-weight"]),
    "a bad candidate": (["--bits-per-weight", "3", "--candidates", "nf3-asym-g64,nf9", "--text", "TEXT"], ["nf9"]),
    "sensitivities in no directory": (
        ["--bits-per-weight", "3", "--text", "TEXT", "--sensitivities", "/proc/none/a.json"],
        ["/proc/none/a.json"],
    ),
    "json that cannot be written": (["--json", "/no/such/dir/a.json"], ["/no/such/dir/a.json"]),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_bad_options_of_quantize(cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path, case: str) -> None:
    options, words = QUANTIZE[case]
    result = cli("quantize", tiny_model_dir, tmp_path / "out", *(str(text) if o == "TEXT" else o for o in options))
    assert_refused(result, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path) -> None:
    arguments = ("--method", "gptq", "--text", text, "--device", "cuda")
    assert_refused(cli("quantize", tiny_model_dir, tmp_path / "out", *arguments), "cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


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


def test_an_existing_output(cli: Cli, tiny_model_dir: Path, packed: Path) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    assert_refused(cli("quantize", tiny_model_dir, packed), str(packed), "exists already")
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


@pytest.mark.parametrize("place", ["text.txt", "text.txt/out", "a" * 300])
def test_a_place_for_the_output_that_does_not_work(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, text: Path, place: str
) -> None:
    assert_refused(cli("quantize", tiny_model_dir, tmp_path / place), place[:50])
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def truncated(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, 5000)


def with_nan(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated shard": (truncated, [WEIGHTS]),
    "NaN in a weight": (with_nan, ["model.layers.0.mlp.up_proj.weight", "NaN"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "config that is no JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "unknown architecture": (lambda d: edit_config(d, model_type="no_such_model"), ["no_such_model"]),
    "config of a wrong type": (lambda d: edit_config(d, hidden_size="wide"), ["hidden_size"]),
    "quantized already": (lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}), ["gptq"]),
    "pickled weights": (lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"), ["safetensors"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_quantizing_a_broken_model(cli: Cli, tiny_copy: Path, tmp_path: Path, case: str) -> None:
    damage, words = BROKEN[case]
    damage(tiny_copy)
    assert_refused(cli("quantize", tiny_copy, tmp_path / "out"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["eval", "info", "generate"])
@pytest.mark.parametrize(
    ("keys", "word"),
    [({"version": 99}, "99"), ({"quant_method": "mystery"}, "mystery"), ({"bits": 3, "format": "nf4"}, "nf4")],
    ids=str,
)
def test_a_quantization_config_that_cannot_be_read(
    cli: Cli, packed: Path, tmp_path: Path, text: Path, command: str, keys: dict[str, object], word: str
) -> None:
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    old = json.loads((model / "config.json").read_text())["quantization_config"]
    edit_config(model, quantization_config={**old, **keys})
    options: dict[str, list[str]] = {"eval": ["--text", str(text)], "info": [], "generate": ["hello"]}
    assert_refused(cli(command, model, *options[command]), word)


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_model_without_a_tokenizer(cli: Cli, packed: Path, tmp_path: Path, text: Path, command: str) -> None:
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert_refused(cli(command, model, *(["--text", text] if command == "eval" else ["hello"])), str(model))


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_model_that_lacks_a_weight(cli: Cli, tiny_copy: Path, text: Path, command: str, name: str) -> None:
    """Transformers would fill it with random numbers, and the results would look like results."""
    tensors = load_file(tiny_copy / WEIGHTS)
    del tensors[name]
    save_file(tensors, tiny_copy / WEIGHTS, {"format": "pt"})
    assert_refused(cli(command, tiny_copy, *(["--text", text] if command == "eval" else ["hello"])), name)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupt_ends_with_130_and_no_output(larger: Path, tmp_path: Path, number: signal.Signals) -> None:
    result = stopped(larger, tmp_path / "out", number)
    assert re.fullmatch(r"afpq: [^\n]+\n", result.err), result.err
    assert (result.code, result.out) == (130, "")
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


# ---- quality


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_scales_beat_one_and_integers_on_a_real_model(cli: Cli, shared: Path, tmp_path: Path) -> None:
    perplexity: dict[str, float] = {}
    measure = ("--text", shared / "text" / "wikitext2-test.txt", "--seq-len", "512", "--max-tokens", "51200")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    for format, side in (("nf3", "asym"), ("nf3", "sym"), ("int3", "asym")):
        for group in ("64", "128"):
            name = f"{format}-{side}-g{group}"
            options = ("--format", format, f"--{side}", "--group-size", group)
            assert cli("quantize", shared / "models" / "lm6m", tmp_path / name, *options).code == 0
            assert cli("eval", tmp_path / name, *measure, "--json", tmp_path / "e.json").code == 0
            perplexity[name] = read_json(tmp_path / "e.json")["perplexity"]
    torch.set_num_threads(threads)
    for group in ("64", "128"):
        assert perplexity[f"nf3-asym-g{group}"] < perplexity[f"nf3-sym-g{group}"], perplexity
        assert perplexity[f"nf3-asym-g{group}"] < perplexity[f"int3-asym-g{group}"], perplexity


@pytest.mark.parametrize(
    ("words", "schemes"),
    [
        (["--lm-head"], ["nf4-asym-g64-log8"]),
        (["--lm-head", "--sym"], ["nf4-sym-g64-log8"]),
        (["--lm-head", "int8-sym-g32"], ["int8-sym-g32"]),
        (["--embedding", "--lm-head", "nf3-asym-g32"], ["nf4-asym-g64-log8", "nf3-asym-g32"]),
    ],
    ids=" ".join,
)
def test_the_ends_are_quantized_where_asked(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, words: list[str], schemes: list[str]
) -> None:
    out, file = str(tmp_path / "out"), tmp_path / "info.json"
    done = cli("quantize", str(tiny_model_dir), out, *words)
    assert done.code == 0, done.err
    assert all(f"as {scheme}" in done.out for scheme in schemes)
    assert cli("info", out, "--json", str(file)).code == 0
    info = json.loads(file.read_text())
    found = [layer["scheme"] for layer in info["layers"] if layer["name"] in info["ends"]]
    assert found == schemes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--lm-head", "nf4"], "scheme 'nf4'"),
        (["--lm-head", "--skip", "lm_head"], "lm_head: to be quantized"),
        (["--embedding", "int8-sym-g0"], "group size 0"),
    ],
    ids=" ".join,
)
def test_a_bad_choice_for_an_end_is_one_line(
    cli: Cli, tiny_model_dir: Path, tmp_path: Path, words: list[str], reason: str
) -> None:
    done = cli("quantize", str(tiny_model_dir), str(tmp_path / "out"), *words)
    assert_refused(done, reason)
    assert not (tmp_path / "out").exists()
