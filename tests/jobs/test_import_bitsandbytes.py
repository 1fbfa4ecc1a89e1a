# SPDX-License-Identifier: MIT
"""Whole checkpoints of bitsandbytes: the same function in our layout, with and without bitsandbytes installed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layout import Layout, convert
from conftest import ModelMaker, save_tied_qwen2
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import afpq
from afpq import AfpqError, AfpqLinear, import_model, quantize
from afpq.checkpoint.info import model_info
from afpq.checkpoint.quantization_config import config_from_json
from afpq.checkpoint.reader import CARD, WEIGHTS

IDS = torch.arange(0, 240, 5).view(2, 24)
LAYOUTS = {
    "nf4": Layout(),
    "nf4 twice": Layout(nested=True),
    "fp4": Layout("fp4"),
    "blocks of 128": Layout(blocksize=128),
    "codes in bfloat16": Layout(storage=torch.bfloat16),
}


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {f"{n}.weight": m.dequantize() for n, m in model.named_modules() if isinstance(m, AfpqLinear)}


@pytest.fixture(autouse=True)
def without_bitsandbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing it fails, as where it is not installed; but for the test that asks it."""
    if "itself" not in request.node.name:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_weight_keeps_its_value(tiny_copy: Path, tmp_path: Path, layout: Layout) -> None:
    before = load_file(tiny_copy / WEIGHTS)
    values = convert(tiny_copy, layout)
    result = import_model(tiny_copy, tmp_path / "out")
    model = load(tmp_path / "out")
    found = weights_of(model)
    assert found.keys() == values.keys() and len(found) == result.layers == 14 and result.exact
    assert all(torch.equal(found[name], value) for name, value in values.items())
    rest = {name: tensor for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items() if name in before}
    assert len(rest) == 7 and all(torch.equal(tensor, before[name]) for name, tensor in rest.items())
    plain = load(tmp_path / "out").dequantize()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    assert "gave the logits" in result.self_test


def test_the_config_tells_everything_needed(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, LAYOUTS["nf4"])
    result = import_model(tiny_copy, tmp_path / "out")
    keys = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    recipe, kept = config_from_json(keys)
    assert str(recipe.scheme) == "nf4-sym-g64" and kept == ["lm_head"]
    assert [(p, str(s)) for p, s in recipe.overrides] == [(r"(^|\.)down_proj$", "nf4-sym-g32")]  # rows of 96
    assert result.schemes == {"nf4-sym-g64": 12, "nf4-sym-g32": 2}
    assert keys["imported_from"] == {
        "quant_method": "bitsandbytes", "quant_type": "nf4", "blocksize": 64, "double_quant": False,
    }  # fmt: skip


def test_true_bits(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, LAYOUTS["nf4"])
    stored = load_file(tiny_copy / WEIGHTS)
    result = import_model(tiny_copy, tmp_path / "out")
    assert result.bits_per_weight == pytest.approx(model_info(tmp_path / "out").bits_per_weight, rel=1e-12)
    of_layers = sum(tensor.nbytes for name, tensor in stored.items() if "proj" in name)
    assert result.bits_before == pytest.approx(8 * of_layers / result.weights)
    assert result.weights == model_info(tmp_path / "out").quantized_parameters
    wide = sum(64 * 96 * (4 + 16 / 32) if "down_proj" in name else 0 for name in stored if name.endswith("absmax"))
    assert result.bits_per_weight == pytest.approx((wide + (result.weights - 2 * 64 * 96) * 4.25) / result.weights)


def test_scales_of_float16_where_asked_for(tiny_copy: Path, tmp_path: Path) -> None:
    values = convert(tiny_copy, LAYOUTS["nf4 twice"])
    exact = import_model(tiny_copy, tmp_path / "exact")
    rounded = import_model(tiny_copy, tmp_path / "rounded", scale_dtype="float16")
    assert exact.exact and not rounded.exact and rounded.bits_per_weight < exact.bits_per_weight
    found = weights_of(load(tmp_path / "rounded"))
    for name, value in values.items():
        assert not torch.equal(found[name], value)
        torch.testing.assert_close(found[name], value, rtol=2**-11, atol=0)
    assert "rounded to float16" in (tmp_path / "rounded" / CARD).read_text()
    wide = import_model(tiny_copy, tmp_path / "wide", scale_dtype="float32")
    assert wide.exact and wide.bits_per_weight == exact.bits_per_weight


def test_one_layer_with_other_scales_is_stored_otherwise(tiny_copy: Path, tmp_path: Path) -> None:
    values = convert(tiny_copy, LAYOUTS["nf4"])
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(tiny_copy / WEIGHTS)
    tensors[f"{name}.absmax"][3] *= 1.0001
    save_file(tensors, tiny_copy / WEIGHTS, {"format": "pt"})
    result = import_model(tiny_copy, tmp_path / "out")
    assert result.schemes == {"nf4-sym-g64": 11, "nf4-sym-g32": 2, "nf4-sym-g64-float32": 1} and result.exact
    found = weights_of(load(tmp_path / "out"))
    assert all(torch.equal(found[other], value) for other, value in values.items() if other != name)
    assert not torch.equal(found[name], values[name])


def test_linears_outside_of_the_blocks(tiny_copy: Path, tmp_path: Path) -> None:
    values = convert(tiny_copy, LAYOUTS["nf4"], skip=())
    assert "lm_head.weight" in values
    result = import_model(tiny_copy, tmp_path / "out")
    found = weights_of(load(tmp_path / "out"))
    assert found.keys() == values.keys() and result.layers == 15
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert model_info(tmp_path / "out").quantized_parameters == result.weights
    afpq.export(tmp_path / "out", tmp_path / "plain", "fp32")
    assert torch.equal(load_file(tmp_path / "plain" / WEIGHTS)["lm_head.weight"], values["lm_head.weight"])


def test_linears_that_were_skipped_stay(tiny_copy: Path, tmp_path: Path) -> None:
    skipped = ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn")
    values = convert(tiny_copy, LAYOUTS["nf4"], skipped)
    import_model(tiny_copy, tmp_path / "out")
    model = load(tmp_path / "out")
    assert weights_of(model).keys() == values.keys() and len(values) == 9
    assert torch.equal(
        model.model.layers[0].mlp.up_proj.weight, load_file(tiny_copy / WEIGHTS)[f"{skipped[1]}.weight"].float()
    )


def test_biases_and_tied_embeddings(tmp_path: Path) -> None:
    model = save_tied_qwen2(tmp_path / "model")
    values = convert(tmp_path / "model", LAYOUTS["nf4 twice"])
    import_model(tmp_path / "model", tmp_path / "out")
    model.load_state_dict({**model.state_dict(), **values})
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model.eval()), rtol=1e-4, atol=1e-5)


def test_the_card(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, LAYOUTS["nf4"])
    (tiny_copy / CARD).write_text("---\nlicense: mit\nbase_model: some/model\n---\n# The original\n")
    import_model(tiny_copy, tmp_path / "out")
    metadata: Any = metadata_load(tmp_path / "out" / CARD)
    assert (metadata["license"], metadata["base_model"]) == ("mit", "some/model")
    assert metadata["tags"] == ["afpq", "quantized", "4-bit", "nf4"] and metadata["library_name"] == "transformers"
    text = (tmp_path / "out" / CARD).read_text()
    assert "# model, imported from bitsandbytes" in text and "import afpq" in text and "exactly the values" in text
    assert str(tmp_path) not in text and {p.name for p in (tmp_path / "out").iterdir()} >= {"tokenizer.json"}


def test_other_checkpoints_are_refused(tiny_model_dir: Path, tiny_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="not quantized"):
        import_model(tiny_model_dir, tmp_path / "out")
    quantize(tiny_model_dir, tmp_path / "ours", evaluate=False)
    with pytest.raises(AfpqError, match="by 'afpq'"):
        import_model(tmp_path / "ours", tmp_path / "out")
    config = json.loads((tiny_copy / "config.json").read_text())
    for keys, words in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no 4-bit weights"),
    ):
        (tiny_copy / "config.json").write_text(json.dumps({**config, "quantization_config": keys}))
        with pytest.raises(AfpqError, match=words):
            import_model(tiny_copy, tmp_path / "out")
    with pytest.raises(AfpqError, match="float16, float32"):
        import_model(tiny_copy, tmp_path / "out", scale_dtype="log8")
    assert not (tmp_path / "out").exists()


def test_quantizing_it_again_is_refused_with_the_way_out(tiny_copy: Path, tmp_path: Path) -> None:
    convert(tiny_copy, LAYOUTS["nf4"])
    with pytest.raises(AfpqError, match=r"already quantized \(bitsandbytes\).*afpq import"):
        quantize(tiny_copy, tmp_path / "out")


@pytest.mark.parametrize("change", ["unknown layer", "shape", "absent"])
def test_a_checkpoint_that_does_not_fit_its_config_is_named(tiny_copy: Path, tmp_path: Path, change: str) -> None:
    convert(tiny_copy, LAYOUTS["nf4"])
    tensors, old = load_file(tiny_copy / WEIGHTS), "model.layers.1.mlp.up_proj.weight"
    if change == "shape":
        config = json.loads((tiny_copy / "config.json").read_text())
        (tiny_copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    else:
        moved = {name: tensors.pop(name) for name in list(tensors) if name.startswith(old)}
        if change == "unknown layer":
            tensors |= {name.replace("up_proj", "side_proj"): tensor for name, tensor in moved.items()}
    save_file(tensors, tiny_copy / WEIGHTS, {"format": "pt"})
    word = {"unknown layer": r"side_proj\.weight is not", "shape": "mlp", "absent": re.escape(old)}[change]
    with pytest.raises(AfpqError, match=word):
        import_model(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore")  # theirs, not ours
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_saved_by_bitsandbytes_itself(make_model: ModelMaker, tmp_path: Path, kind: str, nested: bool) -> None:
    functional: Any = pytest.importorskip("bitsandbytes.functional")
    from transformers import BitsAndBytesConfig

    make_model(tmp_path / "model")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested)
    theirs = load(tmp_path / "model", quantization_config=config)
    theirs.save_pretrained(tmp_path / "bnb")
    result = import_model(tmp_path / "bnb", tmp_path / "out")
    assert (result.kind, result.layers, result.exact) == (kind, 14, True)
    model = load(tmp_path / "out")
    for name, weight in weights_of(model).items():
        packed = theirs.get_parameter(name)
        assert packed.quant_state.dtype == torch.float32  # as it was loaded
        assert torch.equal(weight, functional.dequantize_4bit(packed.data, packed.quant_state)), name
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-3, atol=1e-4)
    shutil.rmtree(tmp_path / "bnb")
