# SPDX-License-Identifier: MIT
"""The layout of bitsandbytes' 4-bit weights, written down a second time with numpy and loops, for tests without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)]
BOOKS = {"nf4": np.array(NF4, np.float32), "fp4": np.array(FP4, np.float32)}


@dataclass(frozen=True)
class Layout:
    kind: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    nested_blocksize: int = 256
    storage: torch.dtype = torch.uint8


def packed(name: str, weight: Tensor, layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
    """(the tensors of a weight as bitsandbytes saves them, float32: the values they stand for)."""
    book, flat = BOOKS[layout.kind], weight.float().flatten().numpy()
    blocks = [flat[i : i + layout.blocksize] for i in range(0, len(flat), layout.blocksize)]
    absmax = np.array([np.abs(block).max() for block in blocks], np.float32)
    state: dict[str, Any] = {
        "quant_type": layout.kind, "blocksize": layout.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    if layout.nested:
        tensors, absmax = _nested(name, absmax, state, layout)
    else:
        tensors[f"{name}.absmax"] = torch.from_numpy(absmax.copy())
    codes, values = [], []
    for block, scale in zip(blocks, absmax, strict=True):
        for value in block:
            code = int(np.abs(book * scale - value).argmin()) if scale else 3  # bitsandbytes leaves any code there
            codes.append(code)
            values.append(book[code] * scale)
    codes += [0] * (len(codes) % 2)
    data = torch.tensor([high * 16 + low for high, low in zip(codes[::2], codes[1::2], strict=True)], dtype=torch.uint8)
    tensors[name] = data.view(layout.storage).view(-1, 1)
    tensors[f"{name}.quant_map"] = torch.from_numpy(book.copy())
    text = json.dumps(state).encode()
    tensors[f"{name}.quant_state.bitsandbytes__{layout.kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors, torch.from_numpy(np.array(values, np.float32)).view(weight.shape)


def _nested(
    name: str, absmax: np.ndarray[Any, Any], state: dict[str, Any], layout: Layout
) -> tuple[dict[str, Tensor], np.ndarray[Any, Any]]:
    """Scales quantized to bytes in their turn: (their tensors, what they stand for)."""
    size, book = layout.nested_blocksize, np.sort(np.tanh(np.linspace(-2, 2, 256)).astype(np.float32))
    book /= np.abs(book).max()
    offset = absmax.mean(dtype=np.float32)
    centred = absmax - offset
    outer = np.array([np.abs(centred[i : i + size]).max() or 1 for i in range(0, len(centred), size)], np.float32)
    bytes_ = [int(np.abs(book * outer[i // size] - value).argmin()) for i, value in enumerate(centred)]
    found = np.array([book[b] * outer[i // size] + offset for i, b in enumerate(bytes_)], np.float32)
    state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": float(offset)}
    tensors = {
        f"{name}.absmax": torch.tensor(bytes_, dtype=torch.uint8),
        f"{name}.nested_absmax": torch.from_numpy(outer),
        f"{name}.nested_quant_map": torch.from_numpy(book),
    }
    return tensors, found


def convert(directory: Path, layout: Layout, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, Tensor]:
    """Make a saved model one of bitsandbytes, in place; returns the values of its quantized weights, by name."""
    tensors, values = load_file(directory / "model.safetensors"), {}
    for name in sorted(tensors):
        if len(tensors[name].shape) == 2 and "embed" not in name and not name.startswith(skip):
            parts, values[name] = packed(name, tensors.pop(name), layout)
            tensors |= parts
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": layout.kind, "bnb_4bit_use_double_quant": layout.nested,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return values
