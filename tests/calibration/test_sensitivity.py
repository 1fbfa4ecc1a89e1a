# SPDX-License-Identifier: MIT
"""Losses are the KL they stand for, few rows tell nearly what all do, and alike experts are one group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradient_runs import WINDOWS, save
from torch import Tensor

from afpq.algorithms import quantize_gptq, quantize_guided, quantize_rtn
from afpq.calibration.linear_hooks import LinearStatistics, SecondMoment
from afpq.calibration.sensitivity import (
    GPTQ_SHARE,
    GroupLosses,
    SensitivitySettings,
    layer_errors,
    left_share,
    measure_losses,
    measured_windows,
)
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.skeleton import build_skeleton
from afpq.numerics.scheme import Scheme, parse_scheme
from afpq.recipe import Recipe

SCHEMES = [parse_scheme(name) for name in ("nf2-asym-g64", "nf3-asym-g64", "nf4-asym-g64")]


def measure(directory: Path, scratch: Path, windows: Tensor = WINDOWS) -> list[GroupLosses]:
    checkpoint, skeleton = open_checkpoint(directory), build_skeleton(directory)
    plan = make_plan(checkpoint, skeleton, Recipe(SCHEMES[1]))
    how = SensitivitySettings(windows, 0, torch.device("cpu"), "mse")
    return measure_losses(plan, skeleton, plan.block_targets, SCHEMES, how, scratch)


def test_groups_in_the_order_they_run_and_losses_fall_with_bits(tmp_path: Path) -> None:
    save("Llama", tmp_path / "model")
    groups = measure(tmp_path / "model", tmp_path)
    inside = [tuple(name.split(".", 4)[-1] for name in group.layers) for group in groups]
    assert inside == 2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    assert [group.layers[0].split(".")[2] for group in groups] == 4 * ["0"] + 4 * ["1"]
    for group in groups:
        assert group.losses is not None and group.losses[0] > 2 * group.losses[1] > 4 * group.losses[2] > 0
    again = measure(tmp_path / "model", tmp_path)
    assert again == groups


def test_experts_of_a_layer_are_one_group_and_idle_ones_cost_nothing(tmp_path: Path) -> None:
    save("Mixtral", tmp_path / "model")
    groups = measure(tmp_path / "model", tmp_path, torch.full((1, 2), 7))  # 2 equal tokens: 2 of 4 experts at most
    experts = [group for group in groups if "experts" in group.layers[0]]
    assert [len(group.layers) for group in experts] == [8, 4, 8, 4]
    assert all(group.losses is not None and min(group.losses) > 0 for group in experts)


def test_what_text_does_not_reach_has_no_losses(tmp_path: Path) -> None:
    save("Mamba", tmp_path / "model")
    unknown = [group for group in measure(tmp_path / "model", tmp_path) if group.losses is None]
    assert [layer for group in unknown for layer in group.layers] == [
        f"backbone.layers.{index}.mixer.dt_proj" for index in (0, 1)
    ]


def test_the_loss_is_the_kl_of_a_small_error(tmp_path: Path) -> None:
    """Of a linear that is the head of a softmax: its KL is known, and the gradients' squares too."""
    torch.manual_seed(0)
    x, W = torch.randn(4000, 32), 0.3 * torch.randn(12, 32)
    p = (x @ W.T).softmax(-1)
    drawn = torch.nn.functional.one_hot(p.multinomial(1)[:, 0], 12)
    gram = SecondMoment()
    gram.add(x)
    tap = LinearStatistics(gram, (p - drawn).square().sum(0), torch.zeros(1), ("head",))
    scheme = parse_scheme("int8-sym-g64")
    loss = layer_errors(W, tap, [scheme], "mse", 12).scattered.item() / 2
    Q = quantize_rtn(W, scheme, "mse", gram.diagonal()).dequantize()
    q = (x @ Q.T).log_softmax(-1)
    kl = (p * (p.log() - q)).sum(-1).mean().item()
    assert loss / 4000 == pytest.approx(kl, rel=0.15)


@pytest.mark.parametrize("limit", [8, 32, 100])
def test_few_rows_tell_nearly_what_all_do(limit: int) -> None:
    generator = torch.Generator().manual_seed(limit)
    W = torch.randn(400, 64, generator=generator) * torch.rand(400, 1, generator=generator)
    gram = SecondMoment()
    gram.add(torch.randn(200, 64, generator=generator))
    tap = LinearStatistics(
        gram, torch.rand(400, generator=generator) ** 8, torch.ones(1), ("x",)
    )  # a few outputs matter most
    some, all_rows = (layer_errors(W, tap, SCHEMES, "mse", rows) for rows in (limit, 400))
    assert some.scattered.tolist() == pytest.approx(all_rows.scattered.tolist(), rel=0.6 / limit**0.5)
    assert some.common[:, 0].tolist() == pytest.approx(all_rows.common[:, 0].tolist(), rel=0.6 / limit**0.5)
    assert 0 > all_rows.common[2, 0] > all_rows.common[1, 0] > all_rows.common[0, 0] > -0.2  # 2 bits shrink most


def test_a_layer_whose_inputs_are_zero_costs_nothing() -> None:
    gram = SecondMoment()
    gram.add(torch.zeros(5, 64))
    errors = layer_errors(
        torch.randn(8, 64), LinearStatistics(gram, torch.ones(8), torch.ones(3), ("x",)), SCHEMES, "mse", 4
    )
    assert errors.scattered.tolist() == [0, 0, 0] and errors.common.tolist() == 3 * [[0, 0, 0]]


def moving(tokens: int, width: int, smooth: float) -> Tensor:
    """Inputs whose neighbours are alike."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    for column in range(1, width):
        x[:, column] = smooth * x[:, column - 1] + (1 - smooth**2) ** 0.5 * x[:, column]
    return x


@pytest.mark.parametrize("smooth", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_share_that_gptq_leaves_is_what_it_leaves(smooth: float, scheme: Scheme) -> None:
    gram, W = SecondMoment(), torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    gram.add(moving(6000, 96, smooth))
    assert gram.H is not None
    nearest = quantize_rtn(W, scheme, "mse", gram.diagonal()).dequantize() - W
    solved = quantize_gptq(W, gram.H, scheme)[0].dequantize() - W
    left = gram.product(solved, solved).sum() / gram.product(nearest, nearest).sum()
    assert left_share(gram, 0.01, 1.0) == pytest.approx(left.item(), rel=0.35)


def test_shares_of_both_sides_multiply() -> None:
    inputs, outputs, scheme = SecondMoment(), SecondMoment(), SCHEMES[0]
    inputs.add(moving(6000, 96, 0.6))
    outputs.add(moving(6000, 64, 0.8))
    assert inputs.H is not None and outputs.H is not None
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    nearest = quantize_rtn(W, scheme, "mse", inputs.diagonal()).dequantize() - W
    solved = quantize_guided(W, inputs.H, outputs.H, scheme)[0].dequantize() - W
    left = inputs.product(solved, outputs.H @ solved).sum() / inputs.product(nearest, outputs.H @ nearest).sum()
    product = left_share(inputs, 0.01, 1.0) * left_share(outputs, 0.01, 1.0)
    assert product == pytest.approx(left.item(), rel=0.35)


def test_the_share_is_a_usual_one_where_few_tokens_tell() -> None:
    few, zero = SecondMoment(), SecondMoment()
    few.add(moving(150, 96, 0.9))
    zero.add(torch.zeros(300, 96))
    assert left_share(few, 0.01, GPTQ_SHARE) == left_share(zero, 0.01, GPTQ_SHARE) == GPTQ_SHARE


def test_windows_are_cut_and_spread() -> None:
    windows = torch.arange(100)[:, None] * 10_000 + torch.arange(2048)
    found = measured_windows(windows)
    assert found.shape == (32, 512) and found[0, 0] == 0 and found[-1, 0] == 990_000
    assert torch.equal(measured_windows(windows[:3, :7]), windows[:3, :7])
