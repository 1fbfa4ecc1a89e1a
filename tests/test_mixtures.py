# SPDX-License-Identifier: MIT
"""Mixtures of experts from a checkpoint to a loaded model: coverage, logits, experts without tokens, names in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import afpq
from afpq.checkpoint.info import model_info
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.commands.application import app
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model
from afpq.jobs.estimate import _calibration_flops, _expert_share
from afpq.jobs.prepare import CalibrationSettings, Texts, prepare
from afpq.model.experts import AfpqExperts
from afpq.model.linear import AfpqLinear
from afpq.recipe import Recipe

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 6, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
}
SCHEME = "nf3-asym-g32"
SETTINGS = CalibrationSettings(samples=4, seq_len=32)
TEXT = "".join(chr(97 + i * i % 26) for i in range(4000))
IDS = torch.arange(24)[None] * 7 % 256


def save(kind: str, directory: Path) -> Path:
    """A random model with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **KINDS[kind]})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("mixtures")
    return {kind: save(kind, place / kind) for kind in KINDS}


def calibrated(source: Path, out: Path, method: str = "gptq", settings: CalibrationSettings = SETTINGS) -> Plan:
    return afpq.quantize(source, out, SCHEME, method=method, text=TEXT, evaluate=False, settings=settings).plan


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def approximated(source: Path, quantized: Any) -> Any:
    """The float model with the quantized layers' weights put into its fused parameters, by hand."""
    model = load_model(source, device="cpu")
    for name, module in quantized.named_modules():
        if not isinstance(module, AfpqLinear):
            continue
        weight = module.dequantize()
        parent, _, leaf = name.rpartition(".")
        place, _, number = parent.rpartition(".")
        if not place.endswith("experts"):
            model.get_submodule(name).weight.data = weight
            continue
        fused, expert = model.get_submodule(place), int(number)
        inner = weight.shape[1] if leaf in ("w2", "down_proj") else weight.shape[0]
        if leaf in ("w2", "down_proj"):
            fused.down_proj.data[expert] = weight.T if fused.is_transposed else weight
        else:
            up = leaf in ("w3", "up_proj")
            if fused.is_transposed:  # gpt-oss: columns of gate and up alternate
                fused.gate_up_proj.data[expert][:, up::2] = weight.T
            else:
                fused.gate_up_proj.data[expert][up * inner : (up + 1) * inner] = weight
    return model


@pytest.mark.parametrize("method", ["rtn", "gptq", "tune"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantize_load_and_run(kind: str, method: str, sources: dict[str, Path], tmp_path: Path) -> None:
    plan = calibrated(sources[kind], tmp_path / "out", method)
    assert plan.coverage >= 0.95
    info = model_info(tmp_path / "out")
    assert abs(info.coverage - plan.coverage) < 0.02 and len(info.layers) == len(plan.targets)
    model = load_model(tmp_path / "out", device="cpu")
    assert sum(isinstance(module, AfpqExperts) for module in model.modules()) == 2
    found = logits(model)
    assert torch.allclose(found, logits(approximated(sources[kind], model)), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again", device="cpu")), found)
    assert open_checkpoint(tmp_path / "again").tensors.keys() == open_checkpoint(tmp_path / "out").tensors.keys()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 27)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_while_loading_is_the_same(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    afpq.quantize(sources[kind], tmp_path / "out", SCHEME, evaluate=False)
    config = afpq.AfpqConfig(format="nf3", group_size=32, scale_dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(sources[kind], quantization_config=config).eval()
    assert torch.equal(logits(model), logits(load_model(tmp_path / "out", device="cpu")))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", device="cpu")), logits(model))


def test_names_in_the_files_are_the_models_own(sources: dict[str, Path], tmp_path: Path) -> None:
    """Other tools know experts by these: vLLM's Mixtral reads block_sparse_moe.experts.0.w1."""
    for kind, name in (("mixtral", "block_sparse_moe.experts.3.w1"), ("qwen3_moe", "mlp.experts.5.gate_proj")):
        assert f"model.layers.1.{name}.weight" in open_checkpoint(sources[kind]).tensors
        afpq.quantize(sources[kind], tmp_path / kind, SCHEME, evaluate=False)
        assert f"model.layers.1.{name}.qweight" in open_checkpoint(tmp_path / kind).tensors


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_experts_are_fused_again(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    afpq.quantize(sources[kind], tmp_path / "out", SCHEME, evaluate=False)
    model = load_model(tmp_path / "out", device="cpu")
    before = logits(model)
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = load_model(tmp_path / "plain", device="cpu")
    assert not any(isinstance(module, (AfpqExperts, AfpqLinear)) for module in plain.modules())
    assert torch.allclose(logits(plain), before, rtol=1e-4, atol=1e-4)
    assert open_checkpoint(tmp_path / "plain").tensors.keys() == open_checkpoint(sources[kind]).tensors.keys()


def notes_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "afpq_log.jsonl").read_text().splitlines()
    return {note["module"]: note for note in map(json.loads, lines)}


def test_experts_too_large_for_moments_of_gradients_are_solved_without(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afpq.calibration.calibrated_run.EXPERTS_BYTES", 100)
    calibrated(sources["mixtral"], tmp_path / "out", "tune")
    notes = [json.loads(line) for line in (tmp_path / "out" / "afpq_log.jsonl").read_text().splitlines()]
    for note in notes:
        expert = ".experts." in note["module"]
        assert note["method"] in (("gptq", "rtn") if expert else ("tune",))
        assert ("note" in note) == expert


def test_gptq_lowers_the_error_of_experts_outputs(sources: dict[str, Path], tmp_path: Path) -> None:
    calibrated(sources["mixtral"], tmp_path / "out")
    experts = [note for name, note in notes_of(tmp_path / "out").items() if "experts" in name]
    assert len(experts) == 24
    assert all(note["output_error"] < note["output_error_before"] for note in experts)
    for layer in range(2):  # two experts a token
        tokens = {n["module"].split(".")[5]: n["tokens"] for n in experts if f"layers.{layer}." in n["module"]}
        assert sum(tokens.values()) == 2 * 4 * 32


def test_an_expert_without_tokens_is_rounded_and_reported(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afpq.calibration.expert_inputs.Routed.tokens_of", _without_expert_0)
        calibrated(sources["mixtral"], tmp_path / "out")
    notes = notes_of(tmp_path / "out")
    starved = [notes[f"model.layers.0.mlp.experts.0.{leaf}"] for leaf in ("w1", "w2", "w3")]
    assert all(n["method"] == "rtn" and "not used on the calibration text" in n["note"] for n in starved)
    assert notes["model.layers.0.mlp.experts.1.w1"]["method"] == "gptq"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model.layers.0.mlp.experts.0.w1" in card and "not used on the calibration text" in card


def _without_expert_0(routed: Any, expert: int | None) -> Any:
    from afpq.calibration.expert_inputs import Tokens

    reached = (routed.chosen == expert).any(dim=1) & (expert != 0)
    return Tokens(routed.hidden, reached.nonzero()[:, 0])


def test_all_experts_learn_from_all_tokens(sources: dict[str, Path], tmp_path: Path) -> None:
    settings = CalibrationSettings(samples=4, seq_len=32, all_experts=True)
    calibrated(sources["qwen3_moe"], tmp_path / "out", settings=settings)
    assert {note["tokens"] for name, note in notes_of(tmp_path / "out").items() if "experts" in name} == {4 * 32}


def test_experts_may_be_skipped_by_the_layer_only(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match=r"layers\.0\.mlp\.experts: 8 of its 12 linears.*skip all experts"):
        afpq.quantize(sources["mixtral"], tmp_path / "out", SCHEME, skip=("w2",), evaluate=False)
    for kind in KINDS:
        out = tmp_path / kind
        plan = afpq.quantize(sources[kind], out, SCHEME, skip=("layers.1.mlp.experts",), evaluate=False).plan
        assert "model.layers.1.mlp.experts" in plan.kept
        model = load_model(out, device="cpu")
        assert [n for n, m in model.named_modules() if isinstance(m, AfpqExperts)] == ["model.layers.0.mlp.experts"]
        assert torch.allclose(logits(model), logits(approximated(sources[kind], model)), rtol=1e-4, atol=1e-4)
        assert model_info(out).coverage == pytest.approx(plan.coverage, abs=0.02)


def test_experts_of_a_layer_may_have_different_schemes(sources: dict[str, Path], tmp_path: Path) -> None:
    down = afpq.parse_scheme("nf4-sym-g32")
    afpq.quantize(sources["mixtral"], tmp_path / "out", SCHEME, overrides=((r"\.w2$", down),), evaluate=False)
    model = load_model(tmp_path / "out", device="cpu")
    experts = model.model.layers[0].mlp.experts
    assert str(experts.get_submodule("0.w2").scheme) == "nf4-sym-g32"
    assert str(experts.get_submodule("0.w1").scheme) == SCHEME
    assert torch.allclose(logits(model), logits(approximated(sources["mixtral"], model)), rtol=1e-4, atol=1e-4)


def test_a_command_says_which_experts_learned_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    command = ["quantize", str(sources["mixtral"]), str(tmp_path / "out"), "--method", "gptq", "--samples", "4"]
    command += ["--seq-len", "32", "--text", str(tmp_path / "text"), "--no-card-measure", "--group-size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afpq.calibration.expert_inputs.Routed.tokens_of", _without_expert_0)
        told = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "json")])
    assert told.exit_code == 0, told.output
    assert (
        "6 layers had nothing to learn from and were rounded to nearest: model.layers.0.mlp.experts.0.w1" in told.output
    )
    rounded = json.loads((tmp_path / "json").read_text())["rounded_to_nearest"]
    assert rounded == [f"model.layers.{i}.mlp.experts.0.{leaf}" for i in (0, 1) for leaf in ("w1", "w2", "w3")]


def test_a_dry_run_counts_only_the_tokens_that_reach_an_expert(sources: dict[str, Path]) -> None:
    """Two of four experts a token: the experts' share of the work is half of what all tokens would make."""
    job = prepare(sources["mixtral"], Recipe(afpq.parse_scheme(SCHEME), "gptq"), Texts(TEXT), settings=SETTINGS)
    experts = [target for target in job.plan.targets if target.expert]
    assert len(experts) == 24
    assert _expert_share(job.plan) == 0.5
    dense = replace(
        job.plan, units=tuple(replace(unit, replaced=_no_experts(unit.replaced)) for unit in job.plan.units)
    )
    assert _expert_share(dense) == 1
    assert _calibration_flops(job.plan, 1000, False) < _calibration_flops(dense, 1000, False)


def _no_experts(replaced: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(replace(part, expert=False) for part in parts) for name, parts in replaced.items()}
