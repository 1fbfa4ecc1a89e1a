# SPDX-License-Identifier: MIT
"""Damage for checkpoints, and the judge of what becomes of them; test_fuzz.py and fuzz_loader.py throw the dice.

Whatever is done to the files, a way to read them must end in one of two: an AfpqError, or a model whose weights and
logits are those that plain code, which shares nothing with the package's, makes of the same files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import afpq.kernels
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import INDEX, WEIGHTS, open_checkpoint
from afpq.errors import AfpqError
from afpq.evaluation.inspect_weights import InspectSettings, inspect_model
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.model.blocks import replace_module
from afpq.model.linear import AfpqLinear

Dice = Callable[[int], int]  # n -> 0 .. n - 1
Files = dict[str, bytes | str]  # name -> content; a string stands for something that is no plain file

MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SCHEMES = (
    "nf4-asym-g32-log8", "nf3-asym-g16", "int4-asym-g32", "fp4-sym-g-1-float32", "nf2-asym-g64", "int8-asym-g32",
    "lut:-1:-0.2:0:0.3:1-asym-g32-log8",
)  # fmt: skip
IDS = torch.tensor([[1, 5, 39, 2, 0]])


# ---- what is damaged


def make_seeds(directory: Path) -> tuple[Files, list[Files]]:
    """(a float checkpoint, quantized ones: each scheme, and the first in two shards)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, initializer_range=0.2)).to(torch.float16)
    model.save_pretrained(directory / "float")
    quantized = []
    for index, scheme in enumerate(SCHEMES):
        out = directory / str(index)
        afpq.quantize(directory / "float", out, scheme, evaluate=False, overrides=_override(index))
        quantized.append(_files(out))
    return _files(directory / "float"), [*quantized, _in_two_shards(quantized[0])]


def _override(index: int) -> tuple[tuple[str, afpq.Scheme], ...]:
    return (("down_proj", afpq.parse_scheme("int3-sym-g16-float32")),) if index == 1 else ()


def _files(directory: Path) -> Files:
    return {name: (directory / name).read_bytes() for name in ("config.json", WEIGHTS)}


def _in_two_shards(files: Files) -> Files:
    header, data = split(_bytes(files[WEIGHTS]))
    names = [name for name in header if name != "__metadata__"]
    shards: dict[str, dict[str, Any]] = {"one.safetensors": {}, "two.safetensors": {}}
    for index, name in enumerate(names):
        shards[list(shards)[index % 2]][name] = header[name]
    result: Files = {"config.json": files["config.json"]}
    for file, members in shards.items():
        parts, entries, at = [], {}, 0
        for name, entry in members.items():
            begin, end = entry["data_offsets"]
            entries[name] = {**entry, "data_offsets": [at, at + end - begin]}
            parts.append(data[begin:end])
            at += end - begin
        result[file] = join(json.dumps(entries), b"".join(parts))
    weight_map = {name: file for file, members in shards.items() for name in members}
    return {**result, INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file -> (header, data)."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _bytes(content: bytes | str) -> bytes:
    return content if isinstance(content, bytes) else b""


# ---- damage

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 8, 16, 64, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, math.nan, math.inf, "",
    "a", "afpq", "nf4", "nf3", "int4", "fp4", "lut:1", "lut:-1:0:nan:1", "float16", "log8", "\ud800", "ü", "\x1b[31m",
    "../x", "(", "a{9999999999}", "(" * 2000, [], [1], ["q_proj"], ["("], [None], {}, {"a": 1},
    {"+:q_proj": {"bits": 3}},
    {"+:(": {}}, {"-:.*": {}}, {"+:q": []}, {"+:q_proj": {"group_size": 16, "rank": "x"}}, [[[[]]]],
)  # fmt: skip
NAMES = (
    "../two.safetensors", "/etc/passwd", "", ".", "..", "x/../two.safetensors", "config.json", "pytorch_model.bin",
    "a\0b", "ü.safetensors", "n" * 300, "\ud800.safetensors", "two.safetensors", None, 3, [],
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    [], [0], [-1], [1, 1], [2**62, 4], [0, 2**64 - 1], [2**64], [10**30], ["a"], None, 3, [32, 16, 1], [1.5],
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I8", "U8", "U16", "C64", "BOOL", "", "u8", 3)
BITS_OF_FLOATS = (
    0x7FC00000, 0x7F800000, 0xFF800000, 1, 0x80000001, 0x7F7FFFFF, 0x00800000, 0x7E007C00, 0xFC000001, 0x03FF0001, 0,
    0x43000000, 0xC3000000,
)  # fmt: skip


def pick(dice: Dice, values: Sequence[Any]) -> Any:
    return values[dice(len(values))]


def damage(files: Files, dice: Dice) -> Files:
    """One or two kinds of damage."""
    for _ in range(1 + dice(2)):
        files = dict(files)
        pick(dice, KINDS)(files, dice)
    return files


def _weights(files: Files, dice: Dice) -> str:
    return str(pick(dice, sorted(name for name in files if name.endswith(".safetensors")) or [WEIGHTS]))


def _config(files: Files, dice: Dice) -> None:
    """A key of config.json, twice as often of its quantization_config: another value, none, or one more key."""
    try:
        config = json.loads(_bytes(files["config.json"]))
        inner = config.get("quantization_config")
        place = inner if isinstance(inner, dict) and dice(3) else config
        key = pick(dice, [*place, "extra", "transformers_weights", "auto_map", "quantization_config", "text_config"])
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return
    if dice(4) == 0:
        place.pop(key, None)
    else:
        place[key] = pick(dice, ODD)
    files["config.json"] = json.dumps(config).encode()


def _header(files: Files, dice: Dice) -> None:
    """An entry of a safetensors header: its dtype, shape, place or name; or it is gone, or there twice."""
    name = _weights(files, dice)
    try:
        header, data = split(_bytes(files[name]))
        tensor = pick(dice, [key for key in header if key != "__metadata__"])
        entry = header[tensor]
        begin, end = map(int, entry["data_offsets"])  # damaged once already, they may be anything
        shape = list(entry["shape"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return
    kind, text = dice(8), ""
    if kind == 0:
        entry["dtype"] = pick(dice, DTYPES)
    elif kind == 1:
        entry["shape"] = pick(dice, (*SHAPES, shape[::-1]))
    elif kind == 2:
        far = pick(dice, (0, -1, 1, 8, 2**63, 2**64 - 1, 10**30, None, "a"))
        entry["data_offsets"] = pick(dice, ([far, end], [begin, far], [end, begin], [begin + 8, end + 8], far))
    elif kind == 3:
        header[pick(dice, ("ü", "", "x" * 5000, "a.0.b", f"{tensor}.qweight", "__metadata__", "\x1b[2J"))] = entry
    elif kind == 4:
        del header[tensor]
    elif kind == 5:
        header["__metadata__"] = pick(dice, ODD)
    elif kind == 6:  # the same key twice
        text = json.dumps(header)[:-1] + f", {json.dumps(tensor)}: {json.dumps({**entry, 'shape': [1]})}}}"
    else:  # two tensors of one size change places
        same = [k for k, v in header.items() if k != "__metadata__" and v["shape"] == entry["shape"]]
        other = header[pick(dice, same)]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    files[name] = join(text or json.dumps(header), data)


def _data(files: Files, dice: Dice) -> None:
    """Bytes of one tensor, mostly of scales: NaN, Inf, denormal, huge, negative, or anything."""
    name = _weights(files, dice)
    try:
        header, data = split(_bytes(files[name]))
        keys = [key for key in header if key != "__metadata__"]
        scales = [key for key in keys if "scale" in key]
        begin, end = header[pick(dice, scales if scales and dice(4) else keys)]["data_offsets"]
        where = begin + 4 * dice(max(1, (end - begin) // 4))
        value = pick(dice, BITS_OF_FLOATS) if dice(4) else dice(2**32)
        data = data[:where] + value.to_bytes(4, "little")[: end - where] + data[end if where >= end else where + 4 :]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        return
    files[name] = _bytes(files[name])[: -len(data)] + data if data else files[name]


def _bits(files: Files, dice: Dice) -> None:
    """A bit of any file, four times as often in its first kilobyte."""
    name = pick(dice, sorted(files))
    content = bytearray(_bytes(files[name]))
    if content:
        content[dice(min(len(content), 1024) if dice(5) else len(content))] ^= 1 << dice(8)
        files[name] = bytes(content)


def _cut(files: Files, dice: Dice) -> None:
    name = pick(dice, sorted(files))
    content = _bytes(files[name])
    files[name] = content[: dice(len(content) + 1)] if dice(3) else content + b"\0" * dice(64)


def _index(files: Files, dice: Dice) -> None:
    """The name of a file in the index, made where there is none; sometimes without the single file beside it."""
    names = [name for name in files if name.endswith(".safetensors")] or [WEIGHTS]
    try:
        index = json.loads(_bytes(files.get(INDEX, b"{}")))
        index.setdefault("weight_map", {"model.norm.weight": names[0]})
        weight_map = index["weight_map"]
        weight_map[pick(dice, [*weight_map, "ghost", "ü"])] = pick(dice, NAMES)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return
    if dice(2) and WEIGHTS in files:
        files["two.safetensors"] = files.pop(WEIGHTS)
    files[INDEX] = json.dumps(index).encode()


def _kind(files: Files, dice: Dice) -> None:
    """Something else in place of a file; or a second file where the first is asked for."""
    name = pick(dice, sorted(files))
    files[name] = pick(dice, ("directory", "pipe", "loop", "dangling", "link to itself outside", b""))


def _nested(files: Files, dice: Dice) -> None:
    name = pick(dice, sorted(name for name in files if name.endswith(".json")) or ["config.json"])
    deep = pick(dice, (900, 100_000))
    opening, closing = pick(dice, ((b"[", b"]"), (b'{"a":', b"}"), (b"[", b""), (b"9", b"")))
    files[name] = opening * deep + b"1" + closing * deep


KINDS = (*[_config] * 4, *[_header] * 4, *[_data] * 5, _bits, _bits, _cut, _index, _kind, _nested)


def write(files: Files, directory: Path) -> None:
    """The files in a directory that is emptied first."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in files.items():
        path = directory / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "directory":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": name, "dangling": "nowhere"}.get(content, "/dev/zero"))


# ---- what must come of it


def plain_weight(tensors: dict[str, Tensor], values: Sequence[float], bits: int, span: int, columns: int) -> Tensor:
    """The weight that saved tensors stand for, float32 [out, columns], bit by bit; groups of `span`."""
    book = np.zeros(2**bits, np.float32)
    book[: len(values)] = values

    def codes(packed: Tensor, count: int) -> np.ndarray[Any, Any]:
        stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : count * bits]
        return (stream.reshape(len(packed), count, bits).astype(np.int64) << np.arange(bits)).sum(-1)

    def scales(name: str) -> np.ndarray[Any, Any]:
        stored = tensors[name].float().numpy() if tensors[name].is_floating_point() else tensors[name].numpy()
        if "scale_grid" in tensors:
            low, step = (float(v) for v in tensors["scale_grid"])
            with np.errstate(over="ignore", under="ignore"):
                sizes = np.exp2(low + step * (stored & 127).astype(np.float64)).astype(np.float32)
            stored = np.where(stored & 128, -sizes, sizes)
        return np.repeat(stored.astype(np.float32), span, axis=1)[:, :columns]

    value = book[codes(tensors["qweight"], columns)]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if "zeros" in tensors:
            zeros = book[codes(tensors["zeros"], len(value))].T
            return torch.from_numpy((value - np.repeat(zeros, span, 1)[:, :columns]) * scales("scales"))
        if "scales" in tensors:
            return torch.from_numpy(value * scales("scales"))
        return torch.from_numpy(value * np.where(value < 0, scales("scales_neg"), scales("scales_pos")))


def same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal to rounding; where numbers overflow, the order of sums decides what becomes of them."""
    if not bool(torch.isfinite(expected).all()):
        return not bool(torch.isfinite(found).all())
    if not bool(torch.isfinite(found).all()):
        return float(expected.abs().max()) > 1e36
    return float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-30


@torch.no_grad()
def check_model(model: Any, directory: Path) -> None:
    """Every weight, and the logits, are what plain code makes of the files."""
    tensors: dict[str, Tensor] = {}
    for file in (
        [directory / WEIGHTS] if (directory / WEIGHTS).exists() else sorted(directory.glob("[ot][nw][eo].safetensors"))
    ):
        tensors |= load_file(file)
    for name, value in model.named_parameters():
        if name in tensors:
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(tensors[name].to(value.dtype))), name
    logits = model(IDS % model.config.vocab_size, use_cache=False).logits
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AfpqLinear):
            parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            book, span = layer.scheme.format, layer.scheme.span(layer.in_features)
            expected = plain_weight(parts, book.values, book.bits, span, layer.in_features)
            native = afpq.kernels.dequantize(
                layer.qweight, *layer._scale_buffers(), book.values, book.bits, layer.scheme.group_size,
                layer.in_features, torch.float32,
            )  # fmt: skip
            for found in (layer.dequantize(), native):
                assert torch.allclose(found, expected, rtol=1e-6, atol=1e-38, equal_nan=True), name
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            linear.weight = nn.Parameter(expected)
            linear.bias = layer.bias
            replace_module(model, name, linear)
    assert same(logits, model(IDS % model.config.vocab_size, use_cache=False).logits, 1e-3), "logits"


def attempt(read: Callable[[], Any], foreign: bool = False) -> tuple[str, Any]:
    """(how it ended, what was read). Only an AfpqError may end it, or with `foreign` any error of Transformers."""
    try:
        return "", read()
    except AfpqError as error:
        text = str(error)
        assert text.strip() and len(text) < 4000, "an error has to say something"
        return "refused", text
    except Exception as error:
        if not foreign:
            raise
        return "refused by Transformers", f"{type(error).__name__}: {error}"


def judge_quantized(directory: Path, direct: bool) -> tuple[str, str]:
    """(outcome, message) of every way to read a quantized checkpoint."""
    from transformers import AutoModelForCausalLM

    refused, found = attempt(lambda: open_checkpoint(directory))
    told = attempt(lambda: model_info(directory))
    with quiet_transformers():
        ended, model = attempt(lambda: load_model(directory, device="cpu"))
        if refused:
            assert ended and told[0], f"opening was refused ({found}), reading was not"
        if not ended:
            check_model(model, directory)
        if direct:
            load: Any = AutoModelForCausalLM.from_pretrained
            how, result = attempt(lambda: load(directory, dtype=torch.float32, output_loading_info=True), foreign=True)
            if not how and not result[1]["missing_keys"]:
                check_model(result[0].eval(), directory)
    return (ended or "loaded and right"), str(model if ended else "")


def judge_float(directory: Path, out: Path) -> tuple[str, str]:
    """(outcome, message) of inspecting and quantizing a float checkpoint."""
    for place in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(place, ignore_errors=True)
    attempt(lambda: inspect_model(directory, InspectSettings(bits=(3,), group_size=32)))
    ended, text = attempt(lambda: afpq.quantize(directory, out, "nf3-asym-g32-log8", evaluate=False))
    assert out.exists() == (not ended), "a result where it was refused, or none where it was not"
    # Weights stay where only the self-test found that they do not load, but not as a model.
    assert not (out.with_name(f"{out.name}.partial") / "config.json").exists(), text
    if not ended:
        with quiet_transformers():
            check_model(load_model(out, device="cpu"), out)
    return (ended or "quantized and right"), str(text if ended else "")
