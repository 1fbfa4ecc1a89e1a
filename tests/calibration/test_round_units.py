# SPDX-License-Identifier: MIT
"""Running a plan: the announced tensors in order, exact, one in memory at a time, with a log for every layer."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afpq import AfpqError, Recipe, parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.algorithms.rtn import quantize_named
from afpq.calibration.round_units import LayerLog, run
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import Checkpoint, open_checkpoint
from afpq.model.skeleton import build_skeleton
from afpq.numerics.groups import relative_error
from afpq.numerics.packing import to_tensors

SCHEME = parse_scheme("nf3-asym-g64")


def plan_of(directory: Path, recipe: Recipe) -> Plan:
    return make_plan(open_checkpoint(directory), build_skeleton(directory), recipe)


@pytest.fixture(scope="module")
def results(tiny_model_dir: Path) -> tuple[dict[str, Tensor], list[LayerLog]]:
    """All output tensors and logs of the tiny model."""
    tensors: dict[str, Tensor] = {}
    logs: list[LayerLog] = []
    for result in run(plan_of(tiny_model_dir, Recipe(SCHEME))):
        tensors.update(result.tensors)
        logs += result.logs
    return tensors, logs


def test_outputs_come_as_planned(tiny_model_dir: Path, results: tuple[dict[str, Tensor], list[LayerLog]]) -> None:
    planned = plan_of(tiny_model_dir, Recipe(SCHEME)).outputs()
    made = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in results[0].items()}
    assert list(made.items()) == list(planned.items())


def test_tensors_are_kept_or_rounded(tiny_model_dir: Path, results: tuple[dict[str, Tensor], list[LayerLog]]) -> None:
    plan = plan_of(tiny_model_dir, Recipe(SCHEME))
    expected: dict[str, Tensor] = {}
    targets = {target.tensor: target for target in plan.targets}
    for name in plan.checkpoint.tensors:
        tensor = plan.checkpoint.read(name)
        if name in targets:
            packed = to_tensors(quantize_rtn(tensor, SCHEME))
            expected |= {targets[name].prefix + part: value for part, value in packed.items()}
        else:
            expected[name] = tensor
    assert set(results[0]) == set(expected)
    assert all(torch.equal(results[0][name], tensor) for name, tensor in expected.items())


def test_every_layer_has_a_log(tiny_model_dir: Path, results: tuple[dict[str, Tensor], list[LayerLog]]) -> None:
    plan = plan_of(tiny_model_dir, Recipe(SCHEME))
    assert [log.module for log in results[1]] == [target.module for target in plan.targets]
    for log, target in zip(results[1], plan.targets):
        entry = log.to_json()
        assert (entry["scheme"], entry["method"]) == ("nf3-asym-g64", "rtn")
        assert entry["bits_per_weight"] == pytest.approx(8 * target.bytes / target.elements)
        assert entry["seconds"] >= 0
        weight = plan.checkpoint.read(target.tensor).double()
        rounded = quantize_rtn(weight, SCHEME).dequantize(torch.float64)
        expected = ((rounded - weight) ** 2).sum() / (weight**2).sum()
        assert entry["weight_error"] == pytest.approx(expected.item(), rel=1e-4)
        assert 0.01 < entry["weight_error"] < 0.1  # three bits of a normal distribution: about 4 %


def test_one_tensor_is_in_memory_at_a_time(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny_model_dir, Recipe(SCHEME))
    alive: list[weakref.ref[Tensor]] = []
    read = Checkpoint.read

    def tracked(self: Checkpoint, name: str) -> Tensor:
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", tracked)
    for result in run(plan):
        for _ in map(len, result.tensors):  # takes each and lets it go
            pass
    assert len(alive) == len(plan.checkpoint.tensors)


def test_overrides_choose_the_scheme(tiny_model_dir: Path) -> None:
    other = parse_scheme("int4-asym-g32")
    plan = plan_of(tiny_model_dir, Recipe(SCHEME, overrides=(("q_proj", other),)))
    schemes: dict[str, str] = {}
    for result in run(plan):
        list(result.tensors)
        schemes |= {log.module: log.scheme for log in result.logs}
    assert {scheme for name, scheme in schemes.items() if "q_proj" in name} == {"int4-asym-g32"}
    assert {scheme for name, scheme in schemes.items() if "q_proj" not in name} == {"nf3-asym-g64"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_unusable_weight_is_named(value: float) -> None:
    weight = torch.ones(4, 128)
    weight[3, 100] = value
    with pytest.raises(AfpqError, match=r"^model\.x\.weight: .*NaN or Inf"):
        quantize_named("model.x.weight", weight, SCHEME, "absmax")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nf4-asym-g32", "int3-sym-g64", "nf2-asym-g-1"])
def test_relative_error_equals_its_definition(dtype: torch.dtype, scheme: str) -> None:
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    solved = quantize_rtn(weight, parse_scheme(scheme))
    rounded = solved.dequantize(torch.float64)
    expected = ((rounded - weight.double()) ** 2).sum() / (weight.double() ** 2).sum()
    assert relative_error(weight, solved) == pytest.approx(expected.item(), rel=1e-5)


def test_relative_error_of_zeros_is_zero() -> None:
    weight = torch.zeros(3, 64)
    assert relative_error(weight, quantize_rtn(weight, SCHEME)) == 0
