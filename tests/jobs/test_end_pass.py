# SPDX-License-Identifier: MIT
"""The end pass: never worse by its judges, nothing changed but scales and vectors, and only what is saved counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from end_pass_models import pair, random_windows, vectors_of
from families import CHEAP, FAMILIES, random_model
from safetensors.torch import load_file
from torch import Tensor

import afpq
from afpq import AfpqError, AfpqLinear, Recipe, parse_scheme
from afpq.checkpoint.reader import CARD, WEIGHTS
from afpq.evaluation.loading import load_model
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.jobs.end_pass import kl, run_end_pass
from afpq.jobs.prepare import Texts, prepare

SCHEMES = ("nf3-asym-g32-log8", "nf3-sym-g32", "nf2-asym-g16-float32", "int3-asym-g32")


def apply(model: torch.nn.Module, scales: dict[str, dict[str, Tensor]], vectors: dict[str, Tensor]) -> None:
    for name, tensors in scales.items():
        layer = model.get_submodule(name)
        for part, tensor in tensors.items():
            assert layer._buffers[part] is not None
            assert (layer._buffers[part].dtype, layer._buffers[part].shape) == (tensor.dtype, tensor.shape)
            layer._buffers[part] = tensor
    for name, vector in vectors.items():
        model.get_parameter(name).data.copy_(vector)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_saved_has_the_kl_that_is_told(tiny_model_dir: Path, scheme: str) -> None:
    model, original = pair(tiny_model_dir, scheme)
    windows = random_windows(16)
    before = {name: layer.quantized_weight() for name, layer in layers(model).items()}
    scales, vectors, told = run_end_pass(model, original, windows, 12, 0, vectors_of(model))
    assert told.kl_after < told.kl_before and 0 < told.kept_step <= 12
    assert (told.training_windows, told.judging_windows) == (14, 2)
    assert set(scales) == set(before) and vectors
    apply(model, scales, vectors)
    judging = windows[::8]
    with torch.no_grad():
        found = sum(kl(original(w[None]).logits, model(w[None]).logits).item() for w in judging) / len(judging)
    assert found == pytest.approx(told.kl_after, rel=1e-3)
    for name, layer in layers(model).items():  # the codes stay, and no scale changed its sign
        now = layer.quantized_weight()
        assert torch.equal(now.codes, before[name].codes)
        assert torch.equal(now.scales.pos.sign(), before[name].scales.pos.sign())


def layers(model: torch.nn.Module) -> dict[str, AfpqLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AfpqLinear)}


def test_other_text_gains_too(tiny_model_dir: Path) -> None:
    model, original = pair(tiny_model_dir, "nf2-asym-g32-log8")
    other = torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(9))
    before = evaluate(model, other, logits_of(original, other)).kl_divergence
    scales, vectors, _ = run_end_pass(model, original, random_windows(64), 40, 0, vectors_of(model))
    apply(model, scales, vectors)
    assert before is not None
    after = evaluate(model, other, logits_of(original, other)).kl_divergence
    assert after is not None and after < 0.95 * before


def test_a_model_that_is_the_original_stays(tiny_model_dir: Path) -> None:
    """Where nothing can become better, nothing is changed."""
    model, original = pair(tiny_model_dir, "nf4-asym-g32-float32")
    for name, layer in layers(model).items():
        original.get_submodule(name).weight.data = layer.dequantize()
    scales, vectors, told = run_end_pass(model, original, random_windows(8), 8, 0, vectors_of(model))
    assert not scales and not vectors and told.kept_step == 0 and told.kl_after == told.kl_before


@pytest.mark.parametrize("family", ["GPT-2", "Gemma 2", "Mixtral", "GPT-NeoX", "OPT"])
def test_families(tmp_path: Path, family: str) -> None:
    """Layer norms and biases, soft caps, experts: whatever a model is made of; from directory to directory."""
    random_model(FAMILIES[family]).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = {**CHEAP, "settings": afpq.CalibrationSettings(samples=16, seq_len=24)}
    plan = afpq.quantize(tmp_path / "model", tmp_path / "out", "nf3-asym-g16-log8", **options, end_pass=8).plan
    told = end_pass_of(tmp_path / "out")
    assert told["kl_after"] < told["kl_before"] and told["steps"] == 8
    tuned, plain = load_file(tmp_path / "out" / WEIGHTS), tmp_path / "plain"
    afpq.quantize(tmp_path / "model", plain, "nf3-asym-g16-log8", **options)
    changed = {name for name, tensor in load_file(plain / WEIGHTS).items() if not torch.equal(tensor, tuned[name])}
    scales = {t.prefix + part for t in plan.targets for part in ("scales_pos", "scales_neg")}
    assert changed & scales and changed - scales  # vectors too
    assert all(tuned[name].dim() == 1 for name in changed - scales)


TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
OPTIONS: dict[str, Any] = {
    "text": TEXT,
    "settings": afpq.CalibrationSettings(samples=16, seq_len=24),
    "evaluate": False,
    "end_pass": 8,
}


def end_pass_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]["end_pass"]
    return found


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_with_every_method(tiny_copy: Path, tmp_path: Path, method: str) -> None:
    save_tokenizer(tiny_copy)
    afpq.quantize(tiny_copy, tmp_path / "out", "nf3-asym-g32", method=method, **OPTIONS)
    told = end_pass_of(tmp_path / "out")
    assert told["kl_after"] <= told["kl_before"] and told["training_windows"] == 14
    assert method != "rtn" or told["kept_step"]
    assert "8 steps of tuning all scales" in (tmp_path / "out" / CARD).read_text("utf-8")
    load_model(tmp_path / "out")


@pytest.mark.parametrize("moment", ["_tuned", "write_whole", "safe_open", "digest"])
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save_tokenizer(tiny_copy)
    afpq.quantize(tiny_copy, tmp_path / "whole", "nf3-asym-g32-log8", **OPTIONS)
    from afpq.jobs import finish_directory as module

    real, count = getattr(module, moment), iter(range(1000))
    after = 10 if moment == "digest" else 0  # of the tensors that the end pass changes, some are written

    def killed(*arguments: Any, **options: Any) -> Any:
        begun = (tmp_path / "out.partial" / "scratch" / "end_pass.safetensors").exists()
        if next(count) >= after and (begun or moment != "digest"):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        afpq.quantize(tiny_copy, tmp_path / "out", "nf3-asym-g32-log8", **OPTIONS)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    afpq.quantize(tiny_copy, tmp_path / "out", "nf3-asym-g32-log8", **OPTIONS)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_bad_wishes(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tiny_copy)
    with pytest.raises(AfpqError, match="end pass needs calibration text"):
        afpq.quantize(tiny_copy, tmp_path / "out", end_pass=5)
    with pytest.raises(AfpqError, match="end pass of -1 steps"):
        afpq.quantize(tiny_copy, tmp_path / "out", end_pass=-1)
    one = afpq.CalibrationSettings(samples=1, seq_len=24)
    with pytest.raises(AfpqError, match="needs 2 windows"):
        prepare(tiny_copy, Recipe(parse_scheme("nf3-asym-g32"), end_pass=5), Texts(TEXT), settings=one)
    monkeypatch.setattr("afpq.jobs.finish_directory.available_memory", lambda: 1000)
    with pytest.raises(AfpqError, match="Do without --end-pass"):
        afpq.quantize(tiny_copy, tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.glob("out*"))


def test_too_few_windows(tiny_model_dir: Path) -> None:
    model, original = pair(tiny_model_dir, "nf3-asym-g32")
    with pytest.raises(AfpqError, match="needs 2 windows"):
        run_end_pass(model, original, random_windows(1), 4, 0, {})


def test_a_damaged_model_is_told(tiny_model_dir: Path) -> None:
    model, original = pair(tiny_model_dir, "nf3-asym-g32")
    original.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(AfpqError, match="NaN or Inf"):
        run_end_pass(model, original, random_windows(4), 4, 0, {})
