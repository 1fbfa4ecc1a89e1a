# SPDX-License-Identifier: MIT
"""Rows of METHODS; and that a made-up row is all that a new method needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import save_tokenizer

import afpq
from afpq import AfpqError, Recipe, parse_scheme
from afpq.algorithms import LayerStatistics, quantize_gptq
from afpq.algorithms.layer_problem import LayerProblem, Solution
from afpq.algorithms.methods import METHODS, Cost, Method, Traits
from afpq.algorithms.solver_options import GptqOptions, SolverOptions, option
from afpq.checkpoint.reader import CARD
from afpq.comparison.cells import Cell
from afpq.comparison.charts import TOOL_COLOUR, colour_of
from afpq.jobs.estimate import estimate
from afpq.jobs.prepare import Texts, prepare
from afpq.model.quantize_in_memory import quantize_model
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import unpack

SCHEME = parse_scheme("nf3-asym-g32")
TEXT = "".join(chr(32 + (i * i * 7 + i // 3) % 90) for i in range(2000))
SETTINGS = afpq.CalibrationSettings(samples=4, seq_len=32)


@dataclass(frozen=True)
class MadeUpOptions(SolverOptions):
    part: float = option(1.0, "Share of the codes that stay.", json="made_up_part")


def solve_made_up(problem: LayerProblem) -> Solution:
    """Round to nearest, with the codes of the first column set to 0: another result than any other method's."""
    solved = problem.nearest
    codes = solved.codes.clone()
    codes[:, 0] = 0
    return Solution(QuantizedWeight(codes, solved.scales, solved.scheme), problem.W)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LayerProblem]]:
    """The problems that two made-up methods get, one with statistics and one without."""
    problems: list[LayerProblem] = []

    def solve(problem: LayerProblem) -> Solution:
        problems.append(problem)
        return solve_made_up(problem)

    def cost(shape: tuple[int, int], *_: object) -> Cost:
        return Cost(flops=1e12, calls=shape[1], bytes=10**12)

    plain = Method(summary="Made up.", solve=solve, options=MadeUpOptions, cost=cost)
    monkeypatch.setitem(METHODS, "plain", plain)
    fed = replace(plain, traits=lambda _: Traits(inputs=True, float_inputs=True, sequential=False))
    monkeypatch.setitem(METHODS, "fed", fed)
    yield problems


@pytest.mark.parametrize("method", ["plain", "fed"])
def test_a_new_row_is_a_whole_method(method: str, seen: list[LayerProblem], tiny_copy: Path, tmp_path: Path) -> None:
    save_tokenizer(tiny_copy)
    text = TEXT if method == "fed" else None
    options = MadeUpOptions(0.5)
    outcome = afpq.quantize(
        tiny_copy, tmp_path / "out", SCHEME, method=method, options=options, text=text, settings=SETTINGS
    )
    assert len(seen) == len(outcome.plan.targets) == 14 and not outcome.rounded
    assert all(problem.options == options and (problem.statistics is None) == (text is None) for problem in seen)
    assert all(problem.statistics.D is not None for problem in seen if problem.statistics is not None)
    logs = [json.loads(line) for line in (tmp_path / "out" / "afpq_log.jsonl").read_text().splitlines()]
    assert {log["method"] for log in logs} == {method}
    assert all(("output_error" in log) == (text is not None) and "note" not in log for log in logs)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (keys["method"], keys["made_up_part"]) == (method, 0.5) and "damp_percent" not in keys
    assert f"by {method}" in (tmp_path / "out" / CARD).read_text().lower()
    model = load(tmp_path / "out")
    first = next(layer for layer in model.modules() if isinstance(layer, afpq.AfpqLinear))
    assert (unpack(first.qweight, 3, first.in_features)[:, 0] == 0).all()


def load(directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # type: ignore[no-any-return]


def test_the_dry_run_has_its_cost(seen: list[LayerProblem], tiny_copy: Path) -> None:
    save_tokenizer(tiny_copy)
    job = prepare(tiny_copy, Recipe(SCHEME, "fed"), Texts(TEXT), settings=SETTINGS)
    assert job.windows is not None
    found = estimate(job.plan, (len(job.windows), job.windows.shape[1]))
    assert found.memory_bytes > 10**12
    columns = sum(target.shape[1] for target in job.plan.targets)
    assert found.seconds > 1e-4 * columns
    free = estimate(prepare(tiny_copy, Recipe(SCHEME, "plain")).plan, None)
    assert free.memory_bytes < 10**12 and free.seconds > 1e-4 * columns
    assert not seen


def test_it_is_used_in_memory_and_has_a_colour(seen: list[LayerProblem], tiny_model_dir: Path) -> None:
    quantize_model(load(tiny_model_dir), Recipe(SCHEME, "plain"))
    assert len(seen) == 14
    with pytest.raises(AfpqError, match="needs calibration text"):
        quantize_model(load(tiny_model_dir), Recipe(SCHEME, "fed"))
    colours = [colour_of(Cell("nf3-asym-g32", name)) for name in METHODS]
    assert TOOL_COLOUR not in colours and len(set(colours[:5])) == 5
    assert colour_of(Cell("int4", "another tool")) == TOOL_COLOUR


def test_what_each_method_needs() -> None:
    calibrated = {name: method.traits(method.options()) for name, method in METHODS.items() if method.calibrated}
    assert list(METHODS) == ["rtn", "gptq", "awq", "awq+gptq", "tune"] and list(calibrated) == [*METHODS][1:]
    assert [name for name, traits in calibrated.items() if traits.float_model] == ["gptq", "awq+gptq", "tune"]
    assert [name for name, traits in calibrated.items() if traits.gradients] == ["tune"]
    assert [name for name, method in METHODS.items() if method.scales_channels] == ["awq", "awq+gptq"]
    off = GptqOptions(float_target=False)
    assert not METHODS["gptq"].traits(off).float_model and METHODS["tune"].traits(off).float_model


def test_guided_gptq_needs_gradients_that_are_there() -> None:
    torch.manual_seed(0)
    W, X, g = torch.randn(64, 32), torch.randn(100, 32), torch.randn(100, 64)
    statistics = LayerStatistics(X.T @ X, None, 100)
    problem = LayerProblem(W, statistics, SCHEME, GptqOptions(), "mse")
    found = METHODS["tune"].solve(problem)
    assert (found.method, found.target is W) == ("gptq", True) and "no gradients" in str(found.note)
    assert torch.equal(found.weight.codes, quantize_gptq(W, statistics.H, SCHEME)[0].codes)
    guided = METHODS["tune"].solve(replace(problem, statistics=replace(statistics, G=g.T @ g)))
    assert guided.method is None and not torch.equal(guided.weight.codes, found.weight.codes)


def test_a_larger_layer_costs_more() -> None:
    for name, method in METHODS.items():
        small, large = (method.cost((n, n), SCHEME, method.options()) for n in (64, 128))
        assert (large.flops > small.flops) == method.calibrated, name
        assert (large.bytes > small.bytes) == method.calibrated, name
