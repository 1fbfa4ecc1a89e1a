# SPDX-License-Identifier: MIT
"""Models published in fp8 and MXFP4: read as floats, quantized to the same bytes; broken scales; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, save_llama, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import afpq
from afpq.checkpoint.float8_tensors import block_of
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import open_checkpoint
from afpq.errors import AfpqError
from afpq.evaluation.inspect_weights import InspectSettings, inspect_model
from afpq.evaluation.loading import load_model
from afpq.jobs.prepare import CalibrationSettings
from afpq.model.tensor_part import TensorPart

BLOCK = (48, 32)  # cuts the tiny model's matrices in ragged blocks
PROJ = "model.layers.0.mlp.down_proj.weight"
TEXT = "".join(chr(97 + i * i % 26) for i in range(3000))
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


def compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": strategy, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


def blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Scales of blocks, so that the largest value of each is 448."""
    rows, columns = weight.split(block[0], 0), block[1]
    return torch.stack([torch.stack([p.abs().amax() / 448 for p in r.split(columns, 1)]) for r in rows])


def expanded(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def by_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = blocks(weight, BLOCK)
    return scales, expanded(scales, BLOCK, weight.shape)


def by_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax() / 448
    return scale, scale


def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    return scales, scales.float()


def by_channel_flat(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 448
    return scales, scales[:, None]


KINDS: dict[str, tuple[dict[str, Any], str, Callable[[Tensor], tuple[Tensor, Tensor]], str]] = {
    "block": (FP8, "_scale_inv", by_block, "block of 48x32"),
    "tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, "_scale", by_tensor, "tensor"),
    "channel": (compressed("channel"), "_scale", by_channel, "channel"),
    "blocks of compressed-tensors": (
        compressed("block", block_structure=list(BLOCK)),
        "_scale",
        by_block,
        "block of 48x32",
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]}, "_scale", by_channel_flat, "ch"),
}


def publish(directory: Path, keys: dict[str, Any], ending: str, scale: Any, dtype: str = "bfloat16") -> Path:
    """Turn the float model in `directory` into fp8; the float model that this stands for goes next to it."""
    tensors: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        weight = weight.to(getattr(torch, dtype))
        if "proj" not in name:
            tensors[name] = floats[name] = weight
            continue
        scales, full = scale(weight.float())
        fp8 = (weight.float() / full).clamp(-448, 448).to(torch.float8_e4m3fn)
        floats[name] = (fp8.float() * full).to(weight.dtype)
        tensors |= {name: fp8, name + ending: scales, name.replace("weight", "input_scale"): torch.tensor(0.5)}
    other = directory.with_name(f"{directory.name}-float")
    other.mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    save_file(floats, other / "model.safetensors", {"format": "pt"})
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"dtype": dtype}
    (other / "config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": keys}))
    return other


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-scaled fp8 model, and NAME-float next to it."""
    directory = save_llama(tmp_path_factory.mktemp("fp8") / "model")
    publish(directory, *KINDS["block"][:3])
    return directory


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_gives_the_bytes_of_the_dequantized_checkpoint(kind: str, dtype: str, tmp_path: Path) -> None:
    keys, ending, scale, words = KINDS[kind]
    source = save_llama(tmp_path / "model")
    floats = publish(source, keys, ending, scale, dtype)
    seen, plain = open_checkpoint(source), open_checkpoint(floats)
    assert {n: (i.dtype, i.shape) for n, i in seen.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in plain.tensors.items()
    }
    assert seen.published is not None and words in seen.published.form and "quantization_config" not in seen.config
    for name in plain.tensors:
        assert torch.equal(seen.read(name), plain.read(name)), name
    rows = [0, 47, 48, 63]
    assert torch.equal(seen.read_rows(TensorPart(PROJ), rows), plain.read(PROJ)[rows])
    for directory, out in ((source, "a"), (floats, "b")):
        afpq.quantize(directory, tmp_path / out, "nf4-asym-g32", skip=("layers.1.mlp.up_proj",))
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in "ab"]
    assert configs[0] == configs[1] and configs[0]["quantization_config"]["quant_method"] == "afpq"
    assert seen.published.form in (tmp_path / "a" / "README.md").read_text()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 150), st.integers(1, 150))
def test_the_shape_of_scales_gives_the_block(rows: int, columns: int, high: int, wide: int) -> None:
    """Whatever block is found has exactly as many scales as there are."""
    scales = (-(-rows // high), -(-columns // wide))
    found = block_of((rows, columns), scales, [(high, wide)])
    assert found is not None and (-(-rows // found[0]), -(-columns // found[1])) == scales
    assert block_of((rows, columns), (scales[0] + rows, scales[1]), [(high, wide)]) is None
    assert block_of((rows, columns), (), []) == (rows, columns)
    assert block_of((7, rows, columns), (7, 1, columns), []) == (1, rows, 1)


def test_calibration_the_card_inspect_and_info(published: Path, tmp_path: Path) -> None:
    settings, outs = CalibrationSettings(samples=4, seq_len=32), {}
    for directory in (published, published.with_name("model-float")):
        out = outs[directory.name] = tmp_path / directory.name
        afpq.quantize(directory, out, "nf4-asym-g32", method="gptq", text=TEXT, settings=settings)
    card = (outs["model"] / "README.md").read_text()
    assert "fp8, float8 with a scale for each block of 48x32; read as floats" in card
    assert "KL divergence from the original" in card  # the original was loaded
    assert (
        "the original's form" in card and "the original's form" not in (outs["model-float"] / "README.md").read_text()
    )
    weights = [load_file(out / "model.safetensors") for out in outs.values()]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    found = [inspect_model(d, InspectSettings(rows=8)).layers for d in (published, published.with_name("model-float"))]
    assert found[0] == found[1]
    info, plain = model_info(published), model_info(published.with_name("model-float"))
    assert info.published is not None and plain.published is None and info.layers == []
    assert info.total_parameters == plain.total_parameters and info.bits_per_weight < plain.bits_per_weight


def test_the_original_is_loaded_as_it_is_read(published: Path) -> None:
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [load_model(d, device="cpu")(ids).logits for d in (published, published.with_name("model-float"))]
    assert torch.equal(*logits)


@pytest.mark.parametrize(("scales", "block"), [((3, 2, 3), (48, 32)), ((3, 1, 96), (64, 1)), ((3,), (64, 96))])
def test_experts_in_one_float8_tensor(scales: tuple[int, ...], block: tuple[int, int], tmp_path: Path) -> None:
    """As fbgemm and others keep them: a parameter [experts, rows, columns], and its scales next to it."""
    source, name = save_llama(tmp_path / "model"), "model.layers.0.mlp.experts.down_proj"
    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    factors = torch.rand(scales)
    edit(source, lambda tensors: tensors.update({name: weight, f"{name}_scale": factors}))
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": FP8, "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(source)
    each = factors.reshape(3, *(-(-size // length) for size, length in zip((64, 96), block)))
    expected = torch.stack([w.float() * expanded(f, block, w.shape) for w, f in zip(weight, each)])
    assert torch.equal(checkpoint.read(name), expected)
    assert torch.equal(checkpoint.read_part(TensorPart(name, 2, (1, 9, 2), True)), expected[2].T[1:9:2])


SCALE = PROJ + "_scale_inv"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(SCALE), f"{SCALE} is missing"),
    "shape": (lambda t: t.update({SCALE: t[SCALE][:1].clone()}), rf"{SCALE} is .*\(2, 3\)"),
    "dtype": (lambda t: t.update({SCALE: t[SCALE].int()}), f"{SCALE} is torch.int32"),
    "no weight": (lambda t: t.pop(PROJ), f"{SCALE} is a float8 weight's scale, but {PROJ} is missing"),
    "float weight": (lambda t: t.update({PROJ: t[PROJ].float()}), f"{SCALE} .* is torch.float32"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_scales_that_do_not_fit_are_named_from_headers(kind: str, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model")
    publish(source, *KINDS["block"][:3])
    change, message = WRONG[kind]
    edit(source, change)
    with pytest.raises(AfpqError, match=message):
        open_checkpoint(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model")
    publish(source, *KINDS["block"][:3])
    edit(source, lambda tensors: tensors[SCALE][1].fill_(value))
    with pytest.raises(AfpqError, match=f"{SCALE} has NaN or Inf"):
        afpq.quantize(source, tmp_path / "out", "nf4-asym-g32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["128", [128], [0, 128], [1.5, 2]])
def test_a_broken_block_size_is_named(size: Any, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model")
    publish(source, {**FP8, "weight_block_size": size}, "_scale_inv", by_block)
    with pytest.raises(AfpqError, match="no shape of a block"):
        open_checkpoint(source)


INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq"}, r"already quantized \(gptq\); give the original model$"),
    "int8": ({"load_in_8bit": True}, r"\(LLM.int8, load_in_8bit of bitsandbytes\); give the original model$"),
    "int8 too": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"\(LLM.int8"),
    "4 bits": ({"load_in_4bit": True}, r"\(bitsandbytes\); give the original model, or .* afpq import"),
    "packed": (INT4 | {"config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}}}, "pack-quantized"),
    "asymmetric": (compressed("channel", symmetric=False), "compressed-tensors, float-quantized"),
    "unknown": ({"bits": 4}, "by a method that its config.json does not name"),
    "afpq": ({"quant_method": "afpq"}, r"already quantized \(afpq\); afpq export it first"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_methods_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    source = save_llama(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": REFUSED[kind][0]}))
    with pytest.raises(AfpqError, match=REFUSED[kind][1]):
        afpq.quantize(source, tmp_path / "out", "nf4-asym-g32")


GPT_OSS = {
    **TINY, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64,
    "intermediate_size": 96, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": None,
}  # fmt: skip


def save_gpt_oss(directory: Path) -> Path:
    """gpt-oss with MXFP4 experts; the float model that they stand for is in NAME-float."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**GPT_OSS)).to(torch.bfloat16)
    other = directory.with_name(f"{directory.name}-float")
    packed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            experts, columns, rows = parameter.shape
            shape = (experts, rows, columns // 32)
            packed[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
            parameter.data = convert_moe_packed_tensors(packed[f"{name}_blocks"], packed[f"{name}_scales"])
    model.save_pretrained(other)
    save_tokenizer(other)
    floats = load_file(other / "model.safetensors")
    directory.mkdir()
    for path in other.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    kept = {name: tensor for name, tensor in floats.items() if f"{name}_blocks" not in packed}
    assert len(kept) + len(packed) // 2 == len(floats)
    save_file(kept | packed, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return directory


def test_mxfp4_gives_the_bytes_of_the_dequantized_checkpoint(tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    other = tmp_path / "model-float"
    seen, plain = open_checkpoint(source), open_checkpoint(other)
    assert {n: i.shape for n, i in seen.tensors.items()} == {n: i.shape for n, i in plain.tensors.items()}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(seen.read(name), plain.read(name))
    part = TensorPart(name, 2, (1, 192, 2), True)
    assert torch.equal(seen.read_part(part), plain.read_part(part))
    assert torch.equal(seen.read_rows(part, [3, 5]), plain.read_rows(part, [3, 5]))
    settings, found = CalibrationSettings(samples=4, seq_len=32), []
    for directory, out in ((source, tmp_path / "a"), (other, tmp_path / "b")):
        afpq.quantize(directory, out, "nf4-asym-g32", method="gptq", text=TEXT, settings=settings)
        found.append(load_file(out / "model.safetensors"))
        assert "KL divergence from the original" in (out / "README.md").read_text()
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][each], found[1][each]) for each in found[1])
    assert "mxfp4" in (tmp_path / "a" / "README.md").read_text()


DOWN = "model.layers.0.mlp.experts.down_proj"
WRONG_MXFP4: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (lambda t: t.pop(f"{DOWN}_scales"), f"{DOWN}_scales are missing"),
    "no blocks": (lambda t: t.pop(f"{DOWN}_blocks"), f"{DOWN}_scales has no {DOWN}_blocks"),
    "shape": (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, 1:].clone()}), f"{DOWN}_scales is"),
    "dtype": (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].int()}), f"{DOWN}_blocks is torch.int32"),
}


@pytest.mark.parametrize("kind", WRONG_MXFP4)
def test_mxfp4_tensors_that_do_not_fit_are_named(kind: str, tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    edit(source, WRONG_MXFP4[kind][0])
    with pytest.raises(AfpqError, match=WRONG_MXFP4[kind][1]):
        open_checkpoint(source)


def test_an_exponent_that_is_no_number_is_named(tmp_path: Path) -> None:
    source = save_gpt_oss(tmp_path / "model")
    edit(source, lambda tensors: tensors[f"{DOWN}_scales"][1, 0].fill_(255))
    with pytest.raises(AfpqError, match=f"{DOWN}_scales has NaN"):
        afpq.quantize(source, tmp_path / "out", "nf4-asym-g32")
