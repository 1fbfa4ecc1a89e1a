# SPDX-License-Identifier: MIT
"""Each family of `families.py` is quantized, saved, loaded and run; what is claimed of it there is true."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tokenizer
from families import CHEAP, FAMILIES, TABLE, Family, random_model, table_text
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import afpq
from afpq import AfpqConfig, AfpqError, AfpqLinear, AwqOptions, GptqOptions
from afpq.algorithms.solver_options import SolverOptions
from afpq.checkpoint.info import model_info
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import WEIGHTS
from afpq.evaluation.loading import generates, load_model
from afpq.model.blocks import find_blocks, in_blocks
from afpq.numerics.packing import from_tensors, layout

SCHEME = "nf4-asym-g32-log8"
KEYS = {"format": "nf4", "group_size": 32}
IDS = torch.arange(3, 243, 5).view(2, 24) % 240
QUICK = ("Llama", "Phi-3", "OPT-350m", "Falcon 40B", "Mamba", "BERT, no head", "T5")  # calibrated in every run
CALIBRATED: dict[str, SolverOptions] = {"gptq": GptqOptions(sweeps=0, order="none"), "awq": AwqOptions()}


def cases(methods: tuple[str, ...] = ("",)) -> list[Any]:
    """A parameter for each family (and method); pending ones are expected to fail, until they do not."""
    found = []
    for name, family in FAMILIES.items():
        for method in methods:
            marks = [pytest.mark.xfail(strict=True, reason=family.pending)] if family.pending else []
            slow = [pytest.mark.slow] if method and name not in QUICK else []
            values = (name, method) if method else (name,)
            found.append(pytest.param(*values, marks=[*marks, *slow], id=" ".join(values).strip()))
    return found


@pytest.fixture(autouse=True)
def bare_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their pictures, which take half of the time."""
    monkeypatch.setattr("afpq.jobs.quality_card.plot_errors", lambda *_: False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's random model in bfloat16; made once."""
    place = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Path:
        model, directory = random_model(FAMILIES[name]), place / re.sub(r"\W", "-", name)
        model.to(torch.bfloat16).save_pretrained(directory)
        save_tokenizer(directory)
        return directory

    return make


@pytest.fixture(scope="module")
def rounded(original: Callable[[str], Path]) -> Callable[[str], tuple[Plan, Path]]:
    """What a family's model is rounded to nearest, and where; made once."""

    @cache
    def make(name: str) -> tuple[Plan, Path]:
        out = original(name).with_name(f"{original(name).name}-rtn")
        return afpq.quantize(original(name), out, SCHEME, evaluate=False).plan, out

    return make


def plain(directory: Path, family: Family, dtype: Any = torch.float32, **options: Any) -> Any:
    """Loaded as a user would."""
    return getattr(transformers, family.architecture).from_pretrained(directory, dtype=dtype, **options).eval()


@torch.no_grad()
def run(model: Any) -> Tensor:
    """Logits, or hidden states where there is no head; a decoder reads the same tokens."""
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    output = model(input_ids=IDS, **decoder)
    return output.logits if "logits" in output else output.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def continuation(model: Any) -> Tensor:
    return model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def unpacked(plan: Plan, out: Path, place: Path, family: Family, float_model: nn.Module) -> Any:
    """The float model with every quantized weight as its codes and scales say: made by Transformers alone."""
    tensors, source = load_file(out / WEIGHTS), load_file(plan.checkpoint.directory / WEIGHTS)
    modules = dict(float_model.named_modules())
    for target in plan.targets:
        parts = {part: tensors.pop(target.prefix + part) for part in layout(target.scheme, *target.shape)}
        weight = from_tensors(parts, target.scheme, target.shape[1]).dequantize()
        turned = isinstance(modules.get(target.module), Conv1D)
        tensors[f"{target.prefix}weight"] = weight.T.contiguous() if turned else weight
    fuse_again(tensors, source)
    assert set(tensors) == set(source)
    place.mkdir()
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    (place / "config.json").write_text((plan.checkpoint.directory / "config.json").read_text())
    return plain(place, family)


def fuse_again(tensors: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Experts one by one -> the source's 3-D tensors, where it has such: gpt-oss's, [in, out], gate and up in turn."""
    for name in [name for name in source if re.search(r"experts\.(gate_up_proj|down_proj)(_bias)?$", name)]:
        parent, leaf = name.rsplit(".", 1)
        end = "bias" if leaf.endswith("_bias") else "weight"
        leaves = ("gate_proj", "up_proj") if "gate_up" in leaf else ("down_proj",)
        experts = []
        for index in range(len(source[name])):
            parts = [tensors.pop(f"{parent}.{index}.{each}.{end}") for each in leaves]
            fused = torch.stack(parts, dim=1).flatten(0, 1)
            experts.append(fused.T if end == "weight" else fused)
        tensors[name] = torch.stack(experts).contiguous()


def coverage_of(model: nn.Module, float_model: nn.Module) -> float:
    """Percent of the blocks' weights, counted in a loaded model."""
    places = {block.name for block in find_blocks(float_model)}
    layers = [m for name, m in model.named_modules() if isinstance(m, AfpqLinear) and in_blocks(name, places)]
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    left = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and in_blocks(name, places))
    return 100 * quantized / (quantized + left)


def check(plan: Plan, out: Path, place: Path, family: Family) -> tuple[Any, Any]:
    """What holds for every method: the loaded model computes what its files say. Returns it and the original."""
    assert (plan.unused, plan.wrapper) == ((), "")
    assert round(100 * plan.coverage, 1) == family.coverage
    model, float_model = load_model(out), plain(plan.checkpoint.directory, family)
    reference = unpacked(plan, out, place, family, float_model)
    assert type(model).__name__ == family.architecture
    assert distance(run(model), run(reference)) < 1e-4
    assert "gave the logits its files say" in (out / "README.md").read_text()
    if generates(model):
        assert torch.equal(continuation(model), continuation(reference))
    return model, float_model


Rounded = Callable[[str], tuple[Plan, Path]]


@pytest.mark.parametrize("name", cases())
def test_rounded_to_nearest(name: str, rounded: Rounded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes what its files say, is near the original, and `info` and a model quantized on loading agree.

    No forward decodes a whole weight, but for the linears that a model multiplies by itself.
    """
    family, (plan, out) = FAMILIES[name], rounded(name)
    source = plan.checkpoint.directory
    model, float_model = check(plan, out, tmp_path / "unpacked", family)
    weights, modules = load_file(source / WEIGHTS), dict(float_model.named_modules())
    for target in plan.targets:
        stored = weights.get(f"{target.prefix}weight")
        if stored is not None:  # else it is a part of a larger tensor
            wanted = stored.T if isinstance(modules.get(target.module), Conv1D) else stored
            assert distance(model.get_submodule(target.module).dequantize(), wanted) < 0.2, target.module
    info = model_info(out)
    assert info.coverage == pytest.approx(plan.coverage) and len(info.layers) == len(plan.targets)
    on_load = plain(source, family, quantization_config=AfpqConfig(**KEYS))
    assert coverage_of(on_load, float_model) == pytest.approx(100 * plan.coverage)
    assert packed(on_load) == packed(model) == {target.module for target in plan.targets}
    assert sorted(on_load.config.quantization_config.modules_to_not_convert) == sorted(plan.kept)
    with monkeypatch.context() as counting:
        decoded = count_decoded(counting)
        found = run(model)
    assert {name for name, m in model.named_modules() if m in decoded} == {n for n in packed(model) if reads(name, n)}
    assert torch.equal(run(on_load), found)


MULTIPLIED = {"Mamba": ".dt_proj"}  # linears whose weight the model itself multiplies by


def reads(family: str, linear: str) -> bool:
    return family in MULTIPLIED and linear.endswith(MULTIPLIED[family])


def packed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AfpqLinear)}


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list that gets each layer whose whole weight is decoded from now on."""
    decoded: list[nn.Module] = []
    dequantize = AfpqLinear.dequantize

    def counted(layer: AfpqLinear, dtype: torch.dtype = torch.float32) -> Tensor:
        decoded.append(layer)
        return dequantize(layer, dtype)

    monkeypatch.setattr(AfpqLinear, "dequantize", counted)
    return decoded


@pytest.mark.parametrize("name", cases())
def test_saved_by_transformers_and_loaded_in_bfloat16(name: str, rounded: Rounded, tmp_path: Path) -> None:
    family, (plan, out) = FAMILIES[name], rounded(name)
    assert round(100 * plan.coverage, 1) == family.coverage
    model = plain(out, family)
    model.save_pretrained(tmp_path / "again")
    again = plain(tmp_path / "again", family)
    assert torch.equal(run(again), run(model))
    rough = plain(out, family, dtype="auto")
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    assert distance(run(rough), run(model)) < 0.2


def quantize_cheaply(model: Path, out: Path, method: str) -> Plan:
    options = CALIBRATED[method]
    made = afpq.quantize(model, out, SCHEME, method=method, options=options, evaluate=False, **CHEAP)  # type: ignore[arg-type]
    return made.plan


@pytest.mark.parametrize(("name", "method"), cases(tuple(CALIBRATED)))
def test_calibrated(name: str, method: str, original: Callable[[str], Path], tmp_path: Path) -> None:
    family, out = FAMILIES[name], tmp_path / "out"
    if family.refused:
        with pytest.raises(AfpqError, match=family.refused):
            quantize_cheaply(original(name), out, method)
        return
    plan = quantize_cheaply(original(name), out, method)
    check(plan, out, tmp_path / "unpacked", family)
    notes = [json.loads(line) for line in (out / "afpq_log.jsonl").read_text().splitlines()]
    for note in notes:
        reached = not any(part in note["module"] for part in family.not_run)
        assert (note["method"] == method) == reached, note
        assert ("output_error" in note) == reached
    if method == "awq":
        assert sum(text.count(" -> ") for text in transforms(notes)) == family.folds


def transforms(notes: list[dict[str, Any]]) -> list[str]:
    """What was done to each block: its layers all tell the same."""
    found: dict[str, str] = {}
    for note in notes:
        match = re.match(r"(.*?\.\d+)\.", note["module"])
        assert match is not None
        found[match[1]] = note.get("transform", "")
    return list(found.values())


def test_the_page_tells_what_is_tested() -> None:
    assert TABLE.read_text("utf-8") == table_text(), "python tests/families.py writes it anew"
