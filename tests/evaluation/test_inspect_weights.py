# SPDX-License-Identifier: MIT
"""What inspecting a model tells, against hand counts and against quantizing it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from afpq import AfpqError, parse_scheme, quantize
from afpq.checkpoint.reader import WEIGHTS, open_checkpoint
from afpq.evaluation.inspect_weights import inspect_model, lopsidedness
from afpq.evaluation.inspection import InspectSettings, gain, mean_error, recommend
from afpq.model.tensor_part import TensorPart

SMALL = InspectSettings(bits=(3,), group_size=32)


def errors_of_quantizing(model: Path, out: Path, scheme: str) -> dict[str, float]:
    quantize(model, out, scheme)
    lines = (out / "afpq_log.jsonl").read_text().splitlines()
    return {line["module"]: line["weight_error"] for line in map(json.loads, lines)}


def test_errors_are_those_of_quantizing_where_all_rows_are_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = inspect_model(tiny_model_dir, SMALL)
    for scheme in ("nf3-asym-g32", "nf3-sym-g32", "nf3-sym-g16", "int3-asym-g32"):
        expected = errors_of_quantizing(tiny_model_dir, tmp_path / scheme, scheme)
        assert {layer.name: layer.errors[scheme] for layer in found.layers} == pytest.approx(expected, rel=1e-5)


def test_bits_are_those_of_quantizing(tiny_model_dir: Path, tmp_path: Path) -> None:
    found = inspect_model(tiny_model_dir, SMALL)
    for scheme, bits in found.bits.items():
        assert bits == quantize(tiny_model_dir, tmp_path / scheme, scheme).plan.bits_per_weight
    assert found.bits["nf3-asym-g32"] == found.bits["nf3-sym-g16"] == 4  # two scales cost half the group


def test_kinds_and_totals(tiny_model_dir: Path) -> None:
    found = inspect_model(tiny_model_dir)
    kinds = found.kinds()
    assert set(kinds) == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    assert all(len(layers) == 2 for layers in kinds.values())
    assert (len(found.layers), found.layers_in_model) == (14, 14)
    assert found.parameters == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert found.settings.bits == (4, 3) and len(found.bits) == 8
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(value["layers"]) == 14 and set(value["recommendations"]) == {"4", "3"}
    assert value["schemes"]["nf4-asym-g128"]["error"] == mean_error(found.layers, "nf4-asym-g128")


def test_a_sample_is_close_to_the_whole_and_the_same_for_a_seed(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    whole, sample, again, other = (
        inspect_model(model, replace(SMALL, **changes))
        for changes in ({"rows": 512}, {"rows": 48}, {"rows": 48}, {"rows": 48, "seed": 1})
    )
    assert [layer.rows for layer in sample.layers] == [48] * 14
    assert sample.layers == again.layers
    assert sample.layers[0].errors != other.layers[0].errors
    for scheme in whole.bits:
        assert mean_error(sample.layers, scheme) == pytest.approx(mean_error(whole.layers, scheme), rel=0.03)


def test_some_layers_only(tiny_model_dir: Path) -> None:
    found = inspect_model(tiny_model_dir, replace(SMALL, layers=3))
    assert (len(found.layers), found.layers_in_model) == (3, 14)
    assert {layer.name for layer in found.layers} <= {layer.name for layer in inspect_model(tiny_model_dir).layers}
    assert len(inspect_model(tiny_model_dir, replace(SMALL, layers=99)).layers) == 14


def test_only_the_drawn_rows_are_read(tiny_model_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(checkpoint.read_rows(TensorPart(name), [0, 5, 63]), checkpoint.read(name)[[0, 5, 63]])
    turned = checkpoint.read_rows(TensorPart(name, transposed=True), [0, 5])
    assert torch.equal(turned, checkpoint.read(name).T[[0, 5]])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([[2.0, -1.0, 1.0, -1.0]], (1.0, 0.0)),  # ratios 2 and 1; torch's median of an even count is the lower one
        ([[4.0, -1.0, 1.0, 1.0]], (4.0, 0.5)),
        ([[0.0, 0.0, 3.0, -1.0]], (3.0, 0.0)),  # zeros have no sides
        ([[0.0, 0.0, 0.0, 0.0]], (1.0, 0.0)),
        ([[1.0, 2.0, -3.0, 0.0]], (1.0, 1.0)),
    ],
)
def test_lopsidedness_by_hand(weight: list[list[float]], expected: tuple[float, float]) -> None:
    assert lopsidedness(torch.tensor(weight), parse_scheme("nf4-asym-g2")) == expected


def test_sides_are_measured_in_the_reach_of_the_book() -> None:
    """A book that reaches 3 above and 1 below is balanced by weights in that proportion."""
    scheme = parse_scheme("lut:-1:0:1:3-asym-g4")
    assert lopsidedness(torch.tensor([[6.0, 1.0, -2.0, 0.5]]), scheme) == (1.0, 0.0)


def rewritten(model: Path, change: object) -> Path:
    """The model with every linear's weight changed."""
    tensors = load_file(model / WEIGHTS)
    for name, tensor in tensors.items():
        if "proj" in name:
            tensors[name] = change(tensor)  # type: ignore[operator]
    save_file(tensors, model / WEIGHTS, {"format": "pt"})
    return model


def test_two_scales_are_recommended_where_sides_differ_much(make_model: ModelMaker, tmp_path: Path) -> None:
    def lopsided(weight: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * 3, weight).contiguous()

    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    found = inspect_model(rewritten(model, lopsided), InspectSettings(bits=(4,)))
    assert recommend(found, 4).startswith("Take nf4-asym-g128: at 4.250 true bits its error is ")
    rivals = found.settings.rivals(4)
    assert gain(found.layers, rivals.two, rivals.half) > 0.1
    assert all(layer.asymmetry > 2 for layer in found.layers)


def test_a_layer_of_zeros(tiny_copy: Path) -> None:
    found = inspect_model(rewritten(tiny_copy, torch.zeros_like), SMALL)
    assert all(set(layer.errors.values()) == {0} and layer.asymmetry == 1 for layer in found.layers)
    assert "within 2 %" in recommend(found, 3)


def test_nan_names_the_tensor(tiny_copy: Path) -> None:
    model = rewritten(tiny_copy, lambda weight: weight.fill_(float("nan")))
    with pytest.raises(AfpqError, match=r"model\.layers\.0\..*proj\.weight: contains NaN"):
        inspect_model(model, SMALL)


def test_threads_are_as_before(tiny_model_dir: Path) -> None:
    threads = torch.get_num_threads()
    inspect_model(tiny_model_dir, SMALL)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("tied", "ends"), [(False, {"model.embed_tokens", "lm_head"}), (True, {"model.embed_tokens"})])
def test_the_ends_shares(make_model: ModelMaker, tmp_path: Path, tied: bool, ends: set[str]) -> None:
    found = inspect_model(make_model(tmp_path / "model", tie_word_embeddings=tied))
    total = 2 * (2 * (64 * 64 + 32 * 64) + 3 * 64 * 96) + 5 * 64 + (1 if tied else 2) * 256 * 64
    assert set(found.ends) == ends
    assert all(share == pytest.approx(256 * 64 / total) for share in found.ends.values())
