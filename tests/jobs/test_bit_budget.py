# SPDX-License-Identifier: MIT
"""A bit budget is kept and used up; layers that read one tensor stay equal; the choice is saved as any other."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from families import slow_but_for
from gradient_runs import save
from hypothesis import given, settings
from hypothesis import strategies as st

import afpq
from afpq import AfpqError, Recipe, parse_scheme
from afpq.calibration.sensitivity import GroupLosses, kind_of_layer
from afpq.evaluation.loading import load_model
from afpq.jobs.bit_budget import CANDIDATES, Budget, choose_schemes, make_budget
from afpq.jobs.chosen_overrides import pattern_of, with_choice
from afpq.jobs.prepare import BudgetSearch, CalibrationSettings, Job, Texts, prepare
from afpq.jobs.sensitivity_file import read_losses
from afpq.model.blocks import find_blocks

TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(4000))
SETTINGS = CalibrationSettings(samples=6, seq_len=48)
FEW = ("nf2-asym-g64-log8", "nf3-asym-g64-log8", "nf4-sym-g64-log8", "nf4-asym-g32-log8")
FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def job(model: Path, bits: float, file: Path | None = None, method: str = "rtn", **changes: Any) -> Job:
    recipe = Recipe(parse_scheme("nf4-asym-g64-log8"), method, **changes)
    budget = make_budget(bits, FEW)
    search = BudgetSearch(budget, file)
    return prepare(model, recipe, Texts(TEXT, evaluate=False), settings=SETTINGS, search=search)


@pytest.fixture(scope="module")
def chosen(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job at 3.5 bits, and the file of what was measured for it."""
    file = tmp_path_factory.mktemp("sensitivities") / "losses.json"
    return job(tiny_model_dir, 3.5, file), file


@settings(max_examples=30)
@given(bits=st.floats(2.3, 4.5), more=st.floats(0, 1))
def test_any_budget_is_kept_and_a_larger_one_is_no_worse(chosen: tuple[Job, Path], bits: float, more: float) -> None:
    plan, choice = chosen[0].plan, chosen[0].choice
    assert choice is not None
    found = choose_schemes(plan, replace(choice.budget, bits_per_weight=bits), choice.groups, {})
    assert bits_of(chosen[0], found) <= bits
    larger = choose_schemes(plan, replace(choice.budget, bits_per_weight=bits + more), choice.groups, {})
    assert larger.kl <= found.kl


def bits_of(job: Job, choice: Any) -> float:
    layers = choice.layers()
    targets = [replace(target, scheme=layers[target.module]) for target in job.plan.block_targets]
    return 8 * sum(t.bytes for t in targets) / sum(t.elements for t in targets)


@pytest.mark.parametrize("bits", [2.4, 3.0, 3.5, 4.2])
def test_the_plan_has_the_bits_and_fused_layers_one_scheme(chosen: tuple[Job, Path], bits: float) -> None:
    found = job(chosen[0].plan.checkpoint.directory, bits, chosen[1])
    assert bits - 0.2 < found.plan.bits_per_weight <= bits
    schemes = {target.module: target.scheme for target in found.plan.targets}
    assert len(schemes) == 14 and set(map(str, schemes.values())) <= set(FEW)
    for block in ("model.layers.0", "model.layers.1"):
        for place, leaves in zip(("self_attn", "mlp"), FUSED):
            assert len({schemes[f"{block}.{place}.{leaf}"] for leaf in leaves}) == 1
    assert found.choice is not None and found.choice.layers() == schemes


def test_a_layer_that_matters_more_gets_more_bits(tiny_copy: Path) -> None:
    """Hidden states 30 times as large behind one linear: its errors weigh 900 times as much."""
    from conftest import edit_weights

    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(tiny_copy, lambda tensors: tensors[name].mul_(30))
    found = job(tiny_copy, 3.3)
    assert found.choice is not None
    layers = found.choice.layers()
    most = max(scheme.format.bits for scheme in layers.values())
    assert layers[name.removesuffix(".weight")].format.bits == most > layers["model.layers.1.mlp.up_proj"].format.bits


QUICK = ("Llama", "GPT-2", "Gemma 2", "Mixtral", "Mamba")  # in every run
REFUSED = {"T5": "without a budget", "BART": "without a budget", "BERT, no head": "predicts no tokens"}


@pytest.mark.parametrize("family", slow_but_for(QUICK, REFUSED))
def test_other_families(tmp_path: Path, family: str) -> None:
    save(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options: Any = {"bits_per_weight": 3.6, "text": TEXT, "settings": SETTINGS, "evaluate": False}
    plan = afpq.quantize(tmp_path / "model", tmp_path / "out", candidates=FEW, **options).plan
    assert 3.4 < plan.bits_per_weight <= 3.6
    by_kind: dict[str, set[str]] = {}  # experts of a layer are of one kind
    for target in plan.targets:
        by_kind.setdefault(kind_of_layer(target), set()).add(str(target.scheme))
    assert all(len(schemes) == 1 for schemes in by_kind.values())
    if family == "Mixtral":
        assert by_kind["model.layers.1.mlp.experts.*.w1"] == by_kind["model.layers.1.mlp.experts.*.w3"]
    if family == "Mamba":  # dt_proj is read, not run: nothing is known of it but the budget
        assert len({t.scheme for t in plan.targets if "dt_proj" in t.module}) == 1
    assert torch.isfinite(load_model(tmp_path / "out")(torch.arange(5, 25)[None]).logits).all()


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_predictions_to_compare(tmp_path: Path, family: str) -> None:
    save(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with pytest.raises(AfpqError, match=REFUSED[family]):
        job(tmp_path / "model", 3.6)


def test_what_the_user_settles_stays_and_counts(tiny_model_dir: Path) -> None:
    int8 = parse_scheme("int8-sym-g64")
    found = job(tiny_model_dir, 4.0, overrides=(("down_proj", int8),), skip=("layers.0.self_attn",))
    assert found.choice is not None and len(found.plan.kept) == 5
    schemes = {target.module: target.scheme for target in found.plan.targets}
    assert {s for name, s in schemes.items() if "down_proj" in name} == {int8}
    assert not any("down_proj" in layer or "layers.0.self_attn" in layer for layer in found.choice.layers())
    assert 3.8 < found.plan.bits_per_weight <= 4.0


def test_the_choice_is_saved_and_loads(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    options: Any = {"bits_per_weight": 3.4, "candidates": FEW, "text": TEXT, "settings": SETTINGS}
    plan = afpq.quantize(tiny_model_dir, tmp_path / "out", **options).plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    saved = json.loads((tmp_path / "out" / "afpq_sensitivities.json").read_text())
    schemes = {str(target.module): str(target.scheme) for target in plan.targets}
    assert {n: s for g, s in zip(saved["groups"], saved["chosen"]) for n in g["layers"]} == schemes
    logged = [json.loads(line) for line in (tmp_path / "out" / "afpq_log.jsonl").read_text().splitlines()]
    assert {entry["module"]: entry["scheme"] for entry in logged} == schemes
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert keys["budget"] == {"bits_per_weight": 3.4, "candidates": list(FEW)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "3.4 true bits per weight" in card and all(scheme in card for scheme in schemes.values())
    for kind, start in ((AutoModelForCausalLM, ""), (AutoModel, "model.")):
        model = kind.from_pretrained(tmp_path / "out")
        for name, scheme in schemes.items():
            assert str(model.get_submodule(name.removeprefix(start)).scheme) == scheme
    # What was measured serves another budget.
    again = tmp_path / "out" / "afpq_sensitivities.json"
    other = job(tiny_model_dir, 3.0, again)
    assert other.plan.bits_per_weight <= 3.0 < plan.bits_per_weight


def test_a_stopped_run_goes_on_without_measuring(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    def stop(unit: str, _done: int, _total: int) -> None:
        if unit.startswith("model.layers.0"):
            raise Stop

    options: Any = {"text": TEXT, "settings": SETTINGS, "evaluate": False, "candidates": FEW}
    with pytest.raises(Stop):
        afpq.quantize(tiny_model_dir, tmp_path / "out", bits_per_weight=3.5, progress=stop, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.sensitivities.json"]
    monkeypatch.setattr("afpq.jobs.bit_budget.measure_losses", lambda *_: pytest.fail("measured again"))
    with pytest.raises(AfpqError, match="another setting"):
        afpq.quantize(tiny_model_dir, tmp_path / "out", bits_per_weight=3.0, **options)
    with pytest.raises(AfpqError, match="another list of candidates"):
        afpq.quantize(tiny_model_dir, tmp_path / "out", bits_per_weight=3.5, **(options | {"candidates": FEW[1:]}))
    afpq.quantize(tiny_model_dir, tmp_path / "out", bits_per_weight=3.5, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"groups": 3}', '{"measured_on": {}, "groups": [{}]}'])
def test_a_file_of_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(AfpqError, match=r"a\.json"):
        read_losses(tmp_path / "a.json", {"text": "x"})


@pytest.mark.parametrize(("bits", "candidates", "words"), [
    (2.0, FEW, ["weight 2:", "2.2812 to 4.5146"]), (9.0, FEW, ["4.5146"]), (0.0, FEW, ["use a number"]),
    (float("nan"), FEW, ["use a number"]), (3.5, (), ["no candidates"]), (3.5, ("nf9-asym-g64",), ["nf9"]),
    (3.5, ("nf3-asym-g64", "nf3-asym-g64"), ["twice"]), (None, FEW, ["--bits-per-weight"]),
])  # fmt: skip
def test_budgets_that_cannot_be(
    tiny_model_dir: Path, tmp_path: Path, bits: float | None, candidates: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(AfpqError) as error:
        afpq.quantize(tiny_model_dir, tmp_path / "out", bits_per_weight=bits, candidates=candidates, text=TEXT)
    assert all(word in str(error.value) for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_budget_needs_text(tiny_model_dir: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(AfpqError, match="text"):
        afpq.quantize(tiny_model_dir, tmp_path / "out", method=method, bits_per_weight=3.5)


def test_candidates_are_spread_over_the_bits() -> None:
    budget = Budget(3.5)
    assert len(budget.candidates) == len(CANDIDATES) and {s.format.bits for s in budget.candidates} == {2, 3, 4}


@pytest.mark.parametrize("damage", ["layer", "loss"])
def test_a_file_that_lacks_something_is_named(chosen: tuple[Job, Path], tmp_path: Path, damage: str) -> None:
    content = json.loads(chosen[1].read_text())
    del content["groups"][0]["layers" if damage == "layer" else "losses"][0]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(AfpqError, match=r"a\.json: does not hold these"):
        job(chosen[0].plan.checkpoint.directory, 3.5, tmp_path / "a.json")


def test_a_pattern_of_blocks_that_are_linears_matches_them() -> None:
    names, blocks = ["model.side.0", "model.layers.1.q"], [f"model.{p}.{i}" for p in ("side", "layers") for i in (0, 1)]
    pattern = pattern_of(names, blocks, "model.")
    seen = [*names, "model.side.1", "model.layers.0.q", "model.side.0.q", "side.0", "model.side.00"]
    assert [name for name in seen if re.search(pattern, name)] == [*names, "side.0"]


NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True)


@given(parts=st.dictionaries(st.sampled_from(["a.q", "a.k", "m.up", "experts.*.w1"]), NUMBERS, min_size=1))
def test_a_pattern_matches_its_layers_and_no_others(parts: dict[str, list[int]]) -> None:
    blocks = [f"model.layers.{number}" for number in range(13)]
    names = [f"model.layers.{number}.{inside}" for inside, numbers in parts.items() for number in numbers]
    pattern = pattern_of(names, blocks, "model.")
    for block in blocks:
        for inside in ("a.q", "a.k", "m.up", "experts.*.w1", "m.upper", "b.a.q", "a.q.b"):
            name = f"{block}.{inside}"
            real = name.replace("*", "17")
            for seen in (real, real.removeprefix("model.")):
                assert (re.search(pattern, seen) is not None) == (name in names), (pattern, seen)


def test_the_scheme_of_most_weights_is_the_recipes_own(chosen: tuple[Job, Path]) -> None:
    job, _ = chosen
    groups = [GroupLosses((target.module,), (0.0,)) for target in job.plan.block_targets]
    assert job.choice is not None
    one = replace(job.choice, groups=tuple(groups), schemes=(parse_scheme(FEW[1]),) * len(groups))
    recipe = with_choice(Recipe(parse_scheme("int4-asym-g64")), one, job.plan, job.model)
    assert str(recipe.scheme) == FEW[1] and recipe.overrides == ()
    assert len(find_blocks(job.model)) == 2
