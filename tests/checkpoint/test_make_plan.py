# SPDX-License-Identifier: MIT
"""Planning from headers: which tensors become which targets, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker, edit_config, edit_weights
from safetensors.torch import load_file
from small_models import plan_of
from torch import Tensor

from afpq import AfpqError, parse_scheme, quantize
from afpq.checkpoint.plan import OUTSIDE
from afpq.checkpoint.reader import WEIGHTS

LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
SHAPES = {  # of the tiny model: hidden 64, keys and values 32, intermediate 96
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def test_blocks_come_in_the_order_of_their_numbers(make_model: ModelMaker, tmp_path: Path) -> None:
    plan = plan_of(make_model(tmp_path / "model", num_hidden_layers=11))
    assert [unit.name for unit in plan.units[1:]] == [f"model.layers.{i}" for i in range(11)]


def test_targets_are_the_linears_of_the_blocks(tiny_model_dir: Path) -> None:
    plan = plan_of(tiny_model_dir)
    expected = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(2) for name in LINEARS}
    assert {target.module: target.shape for target in plan.targets} == expected
    assert all(target.tensor == f"{target.module}.weight" for target in plan.targets)
    assert plan.kept == ("lm_head",)


def test_skip_wins_over_override_and_the_first_override_wins(tiny_model_dir: Path) -> None:
    first, second = parse_scheme("nf3-sym-g32"), parse_scheme("int8-sym-g64")
    plan = plan_of(tiny_model_dir, skip=("gate",), overrides=(("layers.0.mlp", first), ("mlp", second)))
    schemes = {target.module: str(target.scheme) for target in plan.targets}
    assert schemes["model.layers.0.mlp.up_proj"] == "nf3-sym-g32"
    assert schemes["model.layers.1.mlp.up_proj"] == "int8-sym-g64"
    assert schemes["model.layers.1.self_attn.q_proj"] == "nf4-asym-g64"
    assert "model.layers.0.mlp.gate_proj" not in schemes


def test_tied_embeddings_need_no_head(make_model: ModelMaker, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(directory / WEIGHTS)
    plan = plan_of(directory)
    assert len(plan.targets) == 14
    assert "lm_head.weight" not in plan.outputs()
    assert "lm_head" in plan.kept  # a loader must not take it for packed


def test_a_tied_head_that_is_stored_is_copied(make_model: ModelMaker, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", tie_word_embeddings=True)
    edit_weights(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    plan = plan_of(directory)
    assert len(plan.targets) == 14
    assert plan.outputs()["lm_head.weight"] == (torch.float16, (256, 64))


def strip_prefix(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_names_without_the_base_prefix_are_found(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, strip_prefix)
    plan = plan_of(tiny_copy)
    assert len(plan.targets) == 14
    assert [unit.name for unit in plan.units] == [OUTSIDE, "model.layers.0", "model.layers.1"]
    assert plan.targets[0].module.startswith("model.layers.0.")
    assert "layers.0.self_attn.q_proj.qweight" in plan.outputs()
    assert plan.coverage == 1


def test_tensors_the_model_does_not_know_are_copied(tiny_copy: Path) -> None:
    edit_weights(tiny_copy, lambda t: t.update({"mtp.extra.weight": torch.zeros(3, 5)}))
    plan = plan_of(tiny_copy)
    assert plan.outputs()["mtp.extra.weight"] == (torch.float32, (3, 5))
    assert len(plan.targets) == 14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_quantized(tiny_copy: Path, dtype: torch.dtype) -> None:
    edit_weights(tiny_copy, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    assert len(plan_of(tiny_copy).targets) == 14


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q_PROJ), [Q_PROJ]),
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight"]),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 32)}), [Q_PROJ, "(64, 32)", "(64, 64)"]),
        (lambda t: t.update({Q_PROJ: torch.zeros(64 * 64)}), [Q_PROJ]),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}), [Q_PROJ, "int8"]),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 64).to(torch.float8_e4m3fn)}), [Q_PROJ, "float8"]),
    ],
    ids=["missing linear", "missing norm", "wrong shape", "one dimension", "integers", "float8"],
)
def test_a_bad_weight_is_an_error_that_names_it(
    tiny_copy: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    edit_weights(tiny_copy, change)
    with pytest.raises(AfpqError) as error:
        plan_of(tiny_copy)
    assert all(word in str(error.value) for word in [*words, str(tiny_copy)])


def test_a_missing_linear_is_an_error_also_beside_an_unknown_tensor(tiny_copy: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # as old Llama checkpoints have
        del tensors[Q_PROJ]

    edit_weights(tiny_copy, change)
    with pytest.raises(AfpqError, match=Q_PROJ):
        plan_of(tiny_copy)


def test_quantized_checkpoints_are_refused(tiny_model_dir: Path, tiny_copy: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out")
    with pytest.raises(AfpqError, match="already quantized"):
        plan_of(tmp_path / "out")
    edit_config(tiny_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(AfpqError, match=r"already quantized.*gptq"):
        plan_of(tiny_copy)


def test_nothing_left_to_quantize_is_an_error(tiny_model_dir: Path) -> None:
    with pytest.raises(AfpqError, match="skip"):
        plan_of(tiny_model_dir, skip=(".",))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_model"},
        {"hidden_size": "wide"},
        {"hidden_size": -1},
        {"num_hidden_layers": 3},
        {"hidden_size": 128},
        {"quantization_config": "nf4"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_an_error(tiny_copy: Path, changes: dict[str, object]) -> None:
    edit_config(tiny_copy, **changes)
    with pytest.raises(AfpqError):
        plan_of(tiny_copy)


@pytest.mark.parametrize("architectures", [None, [], ["NoSuchModel"]], ids=str)
def test_the_architecture_may_be_left_out(tiny_copy: Path, architectures: object) -> None:
    edit_config(tiny_copy, architectures=architectures)
    assert len(plan_of(tiny_copy).targets) == 14
