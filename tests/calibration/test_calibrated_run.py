# SPDX-License-Identifier: MIT
"""Calibrated methods end to end: better than rounding, resumable to the same bits, unharmed by poor text."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_tokenizer
from safetensors.torch import load_file
from torch import Tensor

import afpq
from afpq.algorithms import LayerStatistics, quantize_rtn
from afpq.algorithms.methods import METHODS
from afpq.algorithms.solver_options import GptqOptions
from afpq.calibration.solve_layer import solve_layer
from afpq.checkpoint.plan import Target
from afpq.errors import AfpqError
from afpq.model.tensor_part import TensorPart
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = afpq.CalibrationSettings(samples=6, seq_len=48)


def quantize(model: Path, out: Path, method: str = "gptq", **changes: object) -> dict[str, Tensor]:
    arguments = {"text": TEXT, "settings": SETTINGS, **changes}
    afpq.quantize(model, out, "nf3-asym-g32", method=method, **arguments)  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logs(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "afpq_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.calibrated])
def test_the_output_error_falls_and_the_result_loads(tiny_model_dir: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    tensors = quantize(tiny_model_dir, tmp_path / "out", method)
    entries = logs(tmp_path / "out")
    assert len(entries) == 14 and {entry["method"] for entry in entries} == {method}
    before = sum(float(str(entry["output_error_before"])) for entry in entries)
    assert (
        sum(float(str(entry["output_error"])) for entry in entries)
        < (0.8 if METHODS[method].traits(METHODS[method].options()).damp is not None else 1) * before
    )
    assert all(entry["tokens"] == 6 * 48 for entry in entries)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()
    assert tensors["model.layers.0.mlp.down_proj.qweight"].dtype == torch.uint8
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert keys["method"] == method and keys["calibration"]["samples"] == 6


def test_same_text_and_seed_same_bits_another_seed_others(tiny_model_dir: Path, tmp_path: Path) -> None:
    first = quantize(tiny_model_dir, tmp_path / "a")
    assert equal(first, quantize(tiny_model_dir, tmp_path / "b"))
    other = afpq.CalibrationSettings(samples=6, seq_len=48, seed=1)
    assert not equal(first, quantize(tiny_model_dir, tmp_path / "c", settings=other))


@pytest.mark.parametrize(
    "options", [GptqOptions(float_target=False), GptqOptions(sequential=False), GptqOptions(order="act", sweeps=0)]
)
def test_every_part_can_be_switched_off(tiny_model_dir: Path, tmp_path: Path, options: GptqOptions) -> None:
    assert not equal(
        quantize(tiny_model_dir, tmp_path / "a"), quantize(tiny_model_dir, tmp_path / "b", options=options)
    )


def test_awq_keeps_the_function_of_what_it_does_not_quantize(tiny_model_dir: Path, tmp_path: Path) -> None:
    tensors = quantize(tiny_model_dir, tmp_path / "out", "awq")
    original = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    assert tensors[name].dtype == original[name].dtype
    changed = [not torch.equal(tensors[n], original[n]) for n in original if "layernorm" in n]
    assert any(changed)
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def test_one_sample_and_text_shorter_than_a_window(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = afpq.CalibrationSettings(samples=1, seq_len=16)
    quantize(tiny_model_dir, tmp_path / "one", settings=one)
    quantize(tiny_model_dir, tmp_path / "short", text="hello you", settings=SETTINGS)
    assert {entry["tokens"] for entry in logs(tmp_path / "short")} == {9}


@pytest.mark.parametrize("text", [None, "", "x"])
def test_no_text_or_too_little_is_an_error(tiny_model_dir: Path, tmp_path: Path, text: str | None) -> None:
    with pytest.raises(AfpqError, match="text"):
        quantize(tiny_model_dir, tmp_path / "out", text=text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_gradients_that_teach_nothing_leave_gptq_with_a_note(fill: float) -> None:
    W, X = torch.randn(8, 16), torch.randn(64, 16)
    target = Target("layer", TensorPart("layer.weight"), parse_scheme("nf3-asym-g8"), (8, 16), "layer.")
    moments = LayerStatistics(X.T @ X, torch.zeros(16, 16), 64, torch.full((8, 8), fill))
    weight, log = solve_layer(W, moments, target, Recipe(target.scheme, "tune"))
    gptq, _ = solve_layer(W, moments, target, Recipe(target.scheme, "gptq"))
    assert torch.equal(weight.codes, gptq.codes)
    assert log.method == "gptq" and log.note is not None and "gradients" in log.note


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_useless_activations_fall_back_to_rounding_with_a_note(fill: float, method: str) -> None:
    W = torch.randn(8, 16)
    target = Target("layer", TensorPart("layer.weight"), parse_scheme("nf3-asym-g8"), (8, 16), "layer.")
    moments = LayerStatistics(torch.full((16, 16), fill), torch.zeros(16, 16), 5)
    weight, log = solve_layer(W, moments, target, Recipe(target.scheme, method))
    nearest = quantize_rtn(W, target.scheme, "mse")
    if method == "gptq" or fill != 0:
        assert log.note is not None and "rounded to nearest" in log.note and log.method == "rtn"
        assert torch.equal(weight.codes, nearest.codes)
    assert torch.isfinite(weight.dequantize()).all()


def test_nan_in_a_weight_names_the_tensor(tiny_copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(tiny_copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tiny_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(AfpqError, match=r"layers\.1"):
        quantize(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- resume

SCRIPT = """
import sys, afpq
from pathlib import Path
text = Path(sys.argv[3]).read_text()
afpq.quantize(sys.argv[1], sys.argv[2], "nf3-asym-g32", method=sys.argv[4], text=text,
              settings=afpq.CalibrationSettings(samples=6, seq_len=48))
"""


def start(model: Path, out: Path, text: Path, method: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(model), str(out), str(text), method])


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", pytest.param("tune", marks=pytest.mark.slow)])
def test_killed_at_random_points_it_ends_with_the_same_bits(
    make_model: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=8)
    text = tmp_path / "text"
    text.write_text(TEXT)
    whole = quantize(model, tmp_path / "whole", method)
    out, journal = tmp_path / "out", tmp_path / "out.partial" / "afpq_journal.jsonl"
    dice = random.Random(method)
    kills = 0
    while not out.exists():
        process = start(model, out, text, method)
        stop_at = (len(journal.read_text().splitlines()) if journal.exists() else 0) + dice.choice([2, 3])
        while process.poll() is None and kills < 3:
            if journal.exists() and len(journal.read_text().splitlines()) >= stop_at:
                time.sleep(dice.random() * 0.3)  # anywhere inside the next block
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
        assert not (tmp_path / "out.partial" / "config.json").exists()
    assert kills >= 2
    assert equal(whole, load_file(out / "model.safetensors"))
    assert [entry["module"] for entry in logs(out)] == [entry["module"] for entry in logs(tmp_path / "whole")]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_stopped_while_gradients_are_taken_it_takes_them_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = quantize(tiny_model_dir, tmp_path / "whole", "tune")
    reports: list[str] = []

    def stop(text: str, _done: int, _total: int) -> None:
        reports.append(text)
        if len(reports) == 4 and "backwards" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model_dir, tmp_path / "out", "tune", progress=stop)
    assert equal(whole, quantize(tiny_model_dir, tmp_path / "out", "tune", progress=stop))
    assert reports[4:8] == reports[:4]


def test_a_model_without_predictions_cannot_be_tuned(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(AfpqError, match="--method gptq"):
        quantize(tmp_path / "model", tmp_path / "out", "tune", evaluate=False)


def test_a_changed_model_text_or_setting_is_refused(tiny_copy: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(unit: str, _done: int, _total: int) -> None:
        if "layers.0" in unit:
            raise Stop

    with pytest.raises(Stop):
        quantize(tiny_copy, tmp_path / "out", progress=stop)
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(AfpqError, match="another text"):
        quantize(tiny_copy, tmp_path / "out", text=TEXT[::-1])
    with pytest.raises(AfpqError, match="begun with another damp"):
        quantize(tiny_copy, tmp_path / "out", options=GptqOptions(damp=0.02))
    os.utime(tiny_copy / "model.safetensors", (1, 1))
    with pytest.raises(AfpqError, match="another model"):
        quantize(tiny_copy, tmp_path / "out")
    quantize(tiny_copy, tmp_path / "out", resume=False)
    assert (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
