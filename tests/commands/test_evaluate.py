# SPDX-License-Identifier: MIT
"""`afpq eval` and `info` from the command line: the library's figures, one clear line for bad options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import TEXT, Cli, assert_refused, read_json
from command_line import cli as cli  # the fixtures
from command_line import packed as packed
from command_line import text as text
from conftest import ModelMaker, edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from afpq.checkpoint.reader import WEIGHTS
from afpq.evaluation.perplexity import evaluate
from afpq.evaluation.text import tokenize, windows


def test_eval_measures_as_the_library_does(cli: Cli, packed: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--text", text, "--seq-len", "50", "--max-tokens", "333", "--json", tmp_path / "e.json")
    assert cli("eval", packed, *arguments).code == 0
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    stream = windows(tokenize(AutoTokenizer.from_pretrained(packed), TEXT), 50, 333)
    assert stream.shape == (6, 50)
    expected, found = evaluate(model, stream), read_json(tmp_path / "e.json")
    assert found["tokens"] == expected.tokens == 6 * 49
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-5)
    assert found["kl_divergence"] is None and found["top1_agreement"] is None


def test_eval_stays_inside_the_context(cli: Cli, packed: Path, text: Path, tmp_path: Path) -> None:
    assert cli("eval", packed, "--text", text, "--json", tmp_path / "e.json").code == 0
    tokens = len(TEXT.encode())
    assert read_json(tmp_path / "e.json")["tokens"] == tokens // 128 * 127


def test_eval_against_itself(cli: Cli, packed: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--text", text, "--seq-len", "64", "--reference", packed, "--json", tmp_path / "e.json")
    assert cli("eval", packed, *arguments).code == 0
    result = read_json(tmp_path / "e.json")
    assert (result["kl_divergence"], result["top1_agreement"]) == (pytest.approx(0, abs=1e-9), 1)


@pytest.mark.parametrize("content", ["ab", "abc"])
def test_eval_of_hardly_any_text_is_still_json(cli: Cli, packed: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "text.txt").write_text(content)
    assert cli("eval", packed, "--text", tmp_path / "text.txt", "--json", tmp_path / "e.json").code == 0
    assert read_json(tmp_path / "e.json")["tokens"] == len(content) - 1


def test_info_of_an_original_model(cli: Cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    result = cli("info", tiny_model_dir, "--json", tmp_path / "i.json")
    assert result.code == 0 and "not quantized" in result.out
    assert read_json(tmp_path / "i.json")["bits_per_weight"] == 16


BAD_EVAL: dict[str, tuple[list[str], list[str]]] = {
    "no text": ([], ["--text"]),
    "two texts": (["--text", "TEXT", "--dataset", "wikitext2"], ["--text"]),
    "text that is missing": (["--text", "/no/such.txt"], ["/no/such.txt"]),
    "text that is a directory": (["--text", "/"], ["/"]),
    "empty text": (["--text", "EMPTY"], ["empty.txt"]),
    "text of one token": (["--text", "ONE"], ["token"]),
    "text that is not UTF-8": (["--text", "BINARY"], ["binary.txt"]),
    "unknown dataset": (["--dataset", "wikipedia"], ["wikipedia", "wikitext2"]),
    "windows of one token": (["--text", "TEXT", "--seq-len", "1"], ["length"]),
    "windows of less": (["--text", "TEXT", "--seq-len", "-5"], ["length"]),
    "windows of letters": (["--text", "TEXT", "--seq-len", "long"], ["--seq-len"]),
    "one token at most": (["--text", "TEXT", "--max-tokens", "1"], ["token"]),
    "fewer tokens than none": (["--text", "TEXT", "--max-tokens", "-5"], ["token"]),
    "missing reference": (["--text", "TEXT", "--reference", "/no/such/dir"], ["/no/such/dir"]),
    "json that cannot be written": (["--text", "TEXT", "--json", "/no/such/dir/a.json"], ["/no/such/dir/a.json"]),
}


@pytest.mark.parametrize("case", BAD_EVAL)
def test_bad_options_of_eval(cli: Cli, packed: Path, tmp_path: Path, text: Path, case: str) -> None:
    files = {"TEXT": text.read_bytes(), "EMPTY": b" \n", "ONE": b"x", "BINARY": b"\xff\xfe\x00"}
    for name, content in files.items():
        (tmp_path / f"{name.lower()}.txt").write_bytes(content)
    options, words = BAD_EVAL[case]
    result = cli("eval", packed, *(tmp_path / f"{o.lower()}.txt" if o in files else o for o in options))
    assert_refused(result._replace(out="") if "--json" in options else result, *words)


@pytest.mark.parametrize("vocabulary", [128, 300])
def test_a_reference_of_another_vocabulary(
    cli: Cli, make_model: ModelMaker, packed: Path, text: Path, tmp_path: Path, vocabulary: int
) -> None:
    other = make_model(tmp_path / "other", vocab_size=vocabulary)
    assert_refused(cli("eval", packed, "--text", text, "--seq-len", "64", "--reference", other), "vocabulary")


def test_a_tokenizer_with_more_tokens_than_the_model(
    cli: Cli, make_model: ModelMaker, text: Path, tmp_path: Path
) -> None:
    assert_refused(cli("eval", make_model(tmp_path / "model", vocab_size=128), "--text", text), "vocabulary")


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
