# SPDX-License-Identifier: MIT
"""Exports: an ordinary checkpoint with exactly the dequantized weights, or one clear error and nothing at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, edit_config, edit_weights, logits_without_afpq, save_tied_qwen2
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import afpq
from afpq import AfpqConfig, AfpqError, export, parse_scheme, quantize
from afpq.checkpoint.checksums import CHECKSUMS
from afpq.checkpoint.quantized_layers import quantized_layers
from afpq.checkpoint.reader import CARD, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from afpq.checkpoint.writer import ShardWriter
from afpq.jobs import export as module
from afpq.jobs import rewrite as writing

IDS = torch.arange(0, 240, 5).view(2, 24)
UP = "model.layers.1.mlp.up_proj"
SCHEMES = ["nf4-asym-g64-log8", "nf3-asym-g128", "int4-asym-g32", "nf2-sym-g-1-float32", "int8-sym-g64", "fp3-asym-g7"]


def load(directory: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits.float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def packed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny float16 model as nf4-asym-g64-log8, for tests that only read it."""
    out = tmp_path_factory.mktemp("packed") / "small"
    quantize(tiny_model_dir, out)
    return out


@pytest.fixture
def broken(packed: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(packed, tmp_path / "broken"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_are_the_dequantized_ones_under_their_old_names(
    tiny_model_dir: Path, tmp_path: Path, scheme: str
) -> None:
    overrides = (("down_proj", parse_scheme("nf3-asym-g32-log8")),)
    quantize(tiny_model_dir, tmp_path / "q", scheme, overrides=overrides, skip=("q_proj",), evaluate=False)
    export(tmp_path / "q", tmp_path / "out", "fp32")
    found, original = load_file(tmp_path / "out" / WEIGHTS), load_file(tiny_model_dir / WEIGHTS)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in original.items()}
    state = load(tmp_path / "q").dequantize().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert torch.equal(found["lm_head.weight"], original["lm_head.weight"].float())


@pytest.mark.parametrize(
    ("to", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), (None, "float16")], ids=str
)
def test_every_float_and_the_config_take_the_dtype(packed: Path, tmp_path: Path, to: str | None, dtype: str) -> None:
    result = export(packed, tmp_path / "out", to)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype and "quantization_config" not in config
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    assert (result.dtype, result.layers, result.kept) == (dtype, 14, ())
    assert result.output_bytes == sum(tensor.nbytes for tensor in tensors.values())
    exact = load(packed).dequantize().state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_torch_dtypes_and_long_names_are_known(packed: Path, tmp_path: Path) -> None:
    for index, dtype in enumerate((torch.bfloat16, "bfloat16")):
        assert export(packed, tmp_path / str(index), dtype).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["fp8", "int8", "", torch.int8, torch.float64], ids=str)
def test_other_dtypes_are_refused(packed: Path, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(AfpqError, match=r"known: bf16, fp16, fp32"):
        export(packed, tmp_path / "out", dtype)
    assert list(tmp_path.iterdir()) == []


def test_what_the_model_keeps_wider_stays(tiny_copy: Path, tmp_path: Path) -> None:
    edit_weights(tiny_copy, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float() + 1e-7}))
    edit_weights(tiny_copy, lambda t: t.update({"model.count": torch.tensor([2**40])}))
    quantize(tiny_copy, tmp_path / "q", evaluate=False)
    result = export(tmp_path / "q", tmp_path / "out", "bf16")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert result.kept == ("model.norm.weight",)
    assert "`model.norm.weight`" in (tmp_path / "out" / CARD).read_text()
    assert torch.equal(tensors.pop("model.norm.weight"), load_file(tiny_copy / WEIGHTS)["model.norm.weight"])
    assert torch.equal(tensors.pop("model.count"), torch.tensor([2**40]))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_float32_model_becomes_narrow_throughout(make_model: ModelMaker, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    edit_weights(tmp_path / "model", lambda t: t.update({name: tensor.float() for name, tensor in t.items()}))
    quantize(tmp_path / "model", tmp_path / "q", evaluate=False)
    assert export(tmp_path / "q", tmp_path / "out", "bf16").kept == ()
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_it_loads_without_afpq_and_computes_the_same(packed: Path, tmp_path: Path) -> None:
    export(packed, tmp_path / "out", "fp32")
    found = logits_without_afpq(tmp_path / "out", tmp_path)
    torch.testing.assert_close(found, logits(load(packed)), rtol=1e-4, atol=1e-5)


def test_biases_and_tied_embeddings(tmp_path: Path) -> None:
    save_tied_qwen2(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "q", evaluate=False)
    export(tmp_path / "q", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert set(tensors) == set(load_file(tmp_path / "model" / WEIGHTS))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "q")), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_saved_by_transformers_in_shards(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = AfpqConfig(format="nf3", group_size=64, scale_dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "q", max_shard_size="40KB")
    export(tmp_path / "q", tmp_path / "out", "fp32")
    found, state = load_file(tmp_path / "out" / WEIGHTS), load(tmp_path / "q").dequantize().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_shards(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(packed, tmp_path / "one", "fp32")
    monkeypatch.setattr(writing, "ShardWriter", lambda directory, outputs: ShardWriter(directory, outputs, 60_000))
    assert export(packed, tmp_path / "many", "fp32") == whole
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    weight_map = json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"]
    assert len(files) > 3 and {file.name for file in files} == set(weight_map.values())
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert list(one.tensors) and all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_rows_unpacked_a_few_at_a_time_make_the_same_weight(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(packed)
    layers = quantized_layers(checkpoint)
    whole = [module.dequantized(checkpoint, layer, torch.float32) for layer in layers]
    monkeypatch.setattr(module, "SLAB_WEIGHTS", 200)  # three rows, or two
    assert all(
        torch.equal(module.dequantized(checkpoint, layer, torch.float32), weight)
        for layer, weight in zip(layers, whole, strict=True)
    )


def test_companions_and_card(broken: Path, tmp_path: Path) -> None:
    (broken / CARD).write_text("---\nlicense: mit\nbase_model: some/model\n---\n# The quantized one\n")
    (broken / "chat_template.jinja").write_text("hello")
    export(broken, tmp_path / "out", "bf16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", WEIGHTS, CARD, CHECKSUMS, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    AutoTokenizer.from_pretrained(tmp_path / "out")
    metadata: Any = metadata_load(tmp_path / "out" / CARD)
    assert (metadata["license"], metadata["base_model"]) == ("mit", "some/model")
    assert metadata["library_name"] == "transformers" and metadata["tags"] == ["afpq", "dequantized"]
    text = (tmp_path / "out" / CARD).read_text()
    assert "# broken, dequantized to bfloat16" in text and "nf4-asym-g64-log8 by rtn" in text
    assert "The quantized one" not in text and str(tmp_path) not in text and afpq.__version__ in text


def test_two_exports_are_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(packed, tmp_path / name, "bf16")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_an_export_can_be_quantized_again(packed: Path, tmp_path: Path) -> None:
    export(packed, tmp_path / "out")
    quantize(tmp_path / "out", tmp_path / "again", evaluate=False)
    assert logits(load(tmp_path / "again")).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{UP}.qweight"), f"{UP}.qweight"),
        (lambda t: t.pop(f"{UP}.scales_neg"), f"{UP}.scales_neg"),
        (lambda t: t.update({f"{UP}.scales_pos": torch.ones(96, 1)}), f"{UP}.scales_pos"),
        (lambda t: t[f"{UP}.scale_grid"].fill_(float("nan")), UP),
        (lambda t: t.update({"extra.qweight": torch.zeros(2, 2, dtype=torch.uint8)}), "extra.qweight is packed"),
    ],
    ids=["no codes", "no scales", "scales' dtype", "NaN scales", "a layer the config does not know"],
)
def test_a_broken_checkpoint_is_named_and_leaves_nothing(
    broken: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    edit_weights(broken, change)
    with pytest.raises(AfpqError, match=words):
        export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_code_beyond_the_format_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "q", "fp4-asym-g64", evaluate=False)  # 15 values for 16 codes
    edit_weights(tmp_path / "q", lambda t: t[f"{UP}.qweight"][5].fill_(255))
    with pytest.raises(AfpqError, match=rf"{UP}\.qweight.*beyond the 15 of fp4"):
        export(tmp_path / "q", tmp_path / "out")


def test_what_was_infinite_before_is_no_overflow(tiny_copy: Path, tmp_path: Path) -> None:
    odd = torch.tensor([float("inf"), float("nan"), 65280.0, -1.0])
    edit_weights(tiny_copy, lambda t: t.update({"model.odd": odd.bfloat16()}))
    quantize(tiny_copy, tmp_path / "q", evaluate=False)
    export(tmp_path / "q", tmp_path / "out", "fp16")
    found = load_file(tmp_path / "out" / WEIGHTS)["model.odd"]
    assert found.isinf().tolist() == [True, False, False, False] and found.isnan()[1]


@pytest.mark.parametrize("name", [f"{UP}.weight", "lm_head.weight"])
def test_a_number_too_large_for_float16_is_named(make_model: ModelMaker, tmp_path: Path, name: str) -> None:
    make_model(tmp_path / "model")
    edit_weights(tmp_path / "model", lambda t: t.update({key: tensor.float() for key, tensor in t.items()}))
    edit_weights(tmp_path / "model", lambda t: t[name][3, 5].fill_(1e5))
    quantize(tmp_path / "model", tmp_path / "q", "nf4-asym-g64-float32", evaluate=False)
    with pytest.raises(AfpqError, match=rf"tensor {name}: 1e\+05 is too large for float16; export to bf16 or fp32"):
        export(tmp_path / "q", tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    export(tmp_path / "q", tmp_path / "out", "bf16")
    assert load_file(tmp_path / "out" / WEIGHTS)[name].max() == torch.tensor(1e5).bfloat16()


def test_what_is_not_ours_is_refused(tiny_model_dir: Path, tiny_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="not quantized"):
        export(tiny_model_dir, tmp_path / "out")
    edit_config(tiny_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(AfpqError, match="by 'gptq'"):
        export(tiny_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_left_alone(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(AfpqError, match="exists already"):
        export(packed, tmp_path / "out")
    with pytest.raises(AfpqError, match="exists already"):
        export(packed, packed)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_stopped_quantization_is_not_swept_away(packed: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model_dir, tmp_path / "out", progress=stop)
    before = sorted((path.name, path.stat().st_size) for path in (tmp_path / "out.partial").iterdir())
    with pytest.raises(AfpqError, match=r"out\.partial: begun with another"):
        export(packed, tmp_path / "out")
    assert sorted((path.name, path.stat().st_size) for path in (tmp_path / "out.partial").iterdir()) == before


def test_a_stop_leaves_nothing(packed: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(packed, tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_told_beforehand(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(AfpqError, match=r"needs .* MB, the disk has 0 MB free"):
        export(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_change_on_the_way_to_the_disk_are_found(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Faulty(ShardWriter):
        def write(self, name: str, tensor: Tensor) -> None:
            super().write(name, tensor + 1 if name == "model.norm.weight" else tensor)

    monkeypatch.setattr(writing, "ShardWriter", Faulty)
    with pytest.raises(AfpqError, match=r"model\.norm\.weight is not in the files as it was computed"):
        export(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_all_bytes(packed: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    result = export(packed, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert seen[-1][1] == seen[-1][2] == result.output_bytes


def test_a_tensor_is_written_before_the_next_is_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So memory does not grow with the model; reading back afterwards is one by one too."""
    steps: list[str] = []
    read, write = Checkpoint.read, ShardWriter.write

    def reading(self: Checkpoint, name: str) -> Tensor:
        steps.append("read")
        return read(self, name)

    def writing_(self: ShardWriter, name: str, tensor: Tensor) -> None:
        steps.append("write")
        write(self, name, tensor)

    monkeypatch.setattr(Checkpoint, "read", reading)
    monkeypatch.setattr(ShardWriter, "write", writing_)
    export(packed, tmp_path / "out")
    streamed = steps[: len(steps) - steps[::-1].index("write")]
    runs = "".join(step[0] for step in streamed).split("w")
    assert streamed.count("write") == 21 and max(map(len, runs)) == 4  # codes, two scales, their grid
