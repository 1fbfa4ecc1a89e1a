# SPDX-License-Identifier: MIT
"""One layer by the recipe's method: what its log states, and what happens if the statistics are unusable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from afpq import AfpqError, GptqOptions, Recipe, parse_scheme
from afpq.algorithms import LayerStatistics, quantize_gptq, quantize_rtn
from afpq.calibration.solve_layer import named, solve_layer
from afpq.checkpoint.plan import Target
from afpq.model.tensor_part import TensorPart

SCHEME = parse_scheme("nf3-asym-g16")
TARGET = Target("a.up", TensorPart("a.up.weight"), SCHEME, (8, 16), "a.up.")


def problem() -> tuple[Tensor, LayerStatistics]:
    torch.manual_seed(0)
    W, X = torch.randn(8, 16), torch.randn(64, 16) @ torch.randn(16, 16)
    return W, LayerStatistics(X.T @ X, None, 64)


def test_the_log_has_the_errors_of_the_outputs() -> None:
    W, statistics = problem()
    recipe = Recipe(SCHEME, "gptq", options=GptqOptions(float_target=False))
    weight, log = solve_layer(W, statistics, TARGET, recipe)
    expected, damp = quantize_gptq(W, statistics.H, SCHEME)
    assert torch.equal(weight.codes, expected.codes)
    assert (log.module, log.method, log.damp, log.tokens, log.note) == ("a.up", "gptq", damp, 64, None)
    E, total = weight.dequantize() - W, ((W @ statistics.H) * W).sum()
    assert log.output_error == pytest.approx(float(((E @ statistics.H) * E).sum() / total), rel=1e-4)
    assert log.output_error < float(log.output_error_before or 0)


@pytest.mark.parametrize("fill", [None, 0.0, math.nan])
def test_unusable_statistics_mean_rounding_to_nearest(fill: float | None) -> None:
    W, _ = problem()
    statistics = None if fill is None else LayerStatistics(torch.full((16, 16), fill), None, 5)
    weight, log = solve_layer(W, statistics, TARGET, Recipe(SCHEME, "gptq", scale_search="mse"))
    assert torch.equal(weight.codes, quantize_rtn(W, SCHEME, "mse").codes)
    assert log.method == "rtn" and "rounded to nearest" in str(log.note)
    assert log.output_error is None and log.output_error_before is None


@pytest.mark.parametrize("fill", [1.0, math.nan])
def test_a_nan_in_the_weight_names_the_tensor(fill: float) -> None:
    W, statistics = problem()
    W[0, 0] = math.nan
    with pytest.raises(AfpqError, match=r"^a\.up\.weight: "):
        solve_layer(W, LayerStatistics(statistics.H * fill, None, 64), TARGET, Recipe(SCHEME, "gptq"))


def test_errors_start_with_the_name() -> None:
    with pytest.raises(AfpqError, match=r"^layer 3: broken$"), named("layer 3"):
        raise AfpqError("broken")
