# SPDX-License-Identifier: MIT
"""The head in a calibrated run: what it reads, GPTQ on it in parts, and an embedding that is rounded beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from safetensors.torch import load_file
from small_models import gemma2, llama, opt, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import afpq
from afpq import parse_scheme
from afpq.algorithms import LayerStatistics, quantize_gptq, quantize_rtn
from afpq.algorithms.solver_options import GptqOptions
from afpq.calibration import head_inputs as head
from afpq.calibration.head_inputs import head_statistics, solve_in_parts
from afpq.calibration.solve_layer import solve_layer
from afpq.checkpoint.plan import Target
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import from_tensors
from afpq.recipe import Recipe

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = afpq.CalibrationSettings(samples=6, seq_len=48)
WEIGHTS = "model.safetensors"


def quantize(model: Path, out: Path, **changes: Any) -> list[dict[str, Any]]:
    save_tokenizer(model)
    options = {"method": "gptq", "text": TEXT, "settings": SETTINGS, **changes}
    afpq.quantize(model, out, "nf3-asym-g32", **options)
    return [json.loads(line) for line in (out / "afpq_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("make", [llama, gemma2, opt])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_heads_output_error_falls(tmp_path: Path, make: Any, method: str) -> None:
    entries = quantize(save(make(False), tmp_path / "model"), tmp_path / "out", lm_head=True, method=method)
    assert [entry["module"] for entry in entries][-1] == "lm_head"
    assert entries[-1]["method"] == method and entries[-1]["tokens"] == 6 * 48
    assert entries[-1]["output_error"] < (0.8 if method == "gptq" else 1) * entries[-1]["output_error_before"]
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize("make", [llama, gemma2, opt])
def test_it_learns_from_what_the_head_reads(tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are not quantized leave the float model's states: then H and D are those of the whole float model."""
    seen: list[LayerStatistics] = []
    original = head_statistics

    def spy(*arguments: Any) -> LayerStatistics:
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr("afpq.calibration.calibrated_run.head_statistics", spy)
    directory = save(make(False), tmp_path / "model")
    windows: list[Tensor] = []
    monkeypatch.setattr("afpq.jobs.prepare.sample_windows", _noting(afpq.jobs.prepare.sample_windows, windows))  # type: ignore[attr-defined]
    quantize(directory, tmp_path / "out", lm_head=True, skip=("layers",))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    read: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(windows[0])
    x = read[0]
    torch.testing.assert_close(seen[0].H, x.T @ x, rtol=1e-3, atol=1e-3 * float((x.T @ x).abs().max()))
    assert seen[0].D is not None and seen[0].D.abs().max() < 1e-3 * seen[0].H.abs().max()


def _noting(function: Any, results: list[Any]) -> Any:
    def noted(*arguments: Any) -> Any:
        results.append(function(*arguments))
        return results[-1]

    return noted


@pytest.mark.parametrize("scheme", ["nf3-asym-g32-log8", "int4-asym-g32", "int8-sym-g64"])
def test_parts_give_what_the_whole_gives(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    W, x = torch.randn(51, 64), torch.randn(200, 64) * torch.rand(64)
    moments = LayerStatistics(x.T @ x, None, 200)
    recipe = Recipe(parse_scheme(scheme), "gptq", options=GptqOptions(float_target=False))
    target = Target("lm_head", TensorPart("lm_head.weight"), recipe.scheme, (51, 64), "lm_head.")
    whole, _ = quantize_gptq(W, moments.H, recipe.scheme, GptqOptions(float_target=False))
    monkeypatch.setattr(head, "PART", 16 * 64)
    tensors, log = solve_in_parts(W, moments, target, recipe, solve_layer)
    found = from_tensors(tensors, recipe.scheme, 64).dequantize()
    torch.testing.assert_close(found, whole.dequantize(), rtol=1e-4, atol=1e-4)
    E = found - W
    assert log.weight_error == pytest.approx((E.square().sum() / W.square().sum()).item(), rel=1e-4)
    expected = ((E @ moments.H) * E).sum() / ((W @ moments.H) * W).sum()
    assert log.output_error == pytest.approx(expected.item(), rel=1e-4)
    assert log.bits_per_weight == pytest.approx(8 * sum(t.nbytes for t in tensors.values()) / W.numel())


def test_a_tied_table_is_rounded_to_nearest_and_the_blocks_see_it(tmp_path: Path) -> None:
    directory = save(gemma2(True), tmp_path / "model")
    entries = quantize(directory, tmp_path / "out", lm_head="nf2-asym-g32")
    table = next(entry for entry in entries if entry["module"] == "model.embed_tokens")
    assert table["method"] == "rtn" and "output_error" not in table and "nearest" in table["note"]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    scheme = parse_scheme("nf2-asym-g32")
    expected = quantize_rtn(load_file(directory / WEIGHTS)["model.embed_tokens.weight"], scheme, "mse").dequantize()
    parts = {
        n.removeprefix("model.embed_tokens."): t for n, t in tensors.items() if n.startswith("model.embed_tokens.")
    }
    assert torch.equal(from_tensors(parts, scheme, 64).dequantize(), expected)
    quantize(directory, tmp_path / "float")
    other = load_file(tmp_path / "float" / WEIGHTS)
    first = "model.layers.0.self_attn.q_proj.qweight"
    assert not torch.equal(tensors[first], other[first])  # it was fitted to other inputs


def test_a_stopped_run_goes_on_with_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(llama(False), tmp_path / "model")
    quantize(directory, tmp_path / "whole", lm_head=True, embedding="int8-sym-g64")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("afpq.calibration.calibrated_run.solve_in_parts", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(directory, tmp_path / "out", lm_head=True, embedding="int8-sym-g64")
    quantize(directory, tmp_path / "out", lm_head=True, embedding="int8-sym-g64")
    whole, resumed = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
