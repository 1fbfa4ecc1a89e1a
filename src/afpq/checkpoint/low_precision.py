# SPDX-License-Identifier: MIT
"""Which quantized checkpoints are originals of a low precision, read as floats, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afpq.checkpoint.encoded import FloatView, Header, decoded_dtype
from afpq.checkpoint.float8_tensors import Block, float8_view
from afpq.checkpoint.mxfp4_tensors import mxfp4_view
from afpq.errors import AfpqError

KEY = "quantization_config"
FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors: one value a byte, nothing packed


def float_view(directory: Path, config: Mapping[str, Any], headers: Mapping[str, Header]) -> FloatView | None:
    """The decoded view of a checkpoint that is published in fp8 or MXFP4; None for any other.

    Raises AfpqError for a config or tensors that are not as the method has them.
    """
    keys = config.get(KEY)
    method = keys.get("quant_method") if isinstance(keys, dict) else None
    if not isinstance(keys, dict):
        return None
    if method == "mxfp4":
        return mxfp4_view(headers, decoded_dtype(config))
    if method == "compressed-tensors":
        found = _compressed_blocks(directory, keys)
    elif method in ("fp8", "fbgemm_fp8"):
        found = _blocks(directory, [keys.get("weight_block_size")])
    else:
        return None
    return None if found is None else float8_view(str(method), headers, found, decoded_dtype(config))


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the decoded model."""
    return {key: value for key, value in config.items() if key != KEY}


def refuse_quantized(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises AfpqError, with the method's name and what to do, for a config that has a quantization_config."""
    keys = config.get(KEY)
    if not keys:
        return
    name, advice = str(keys)[:80], "give the original model"
    if isinstance(keys, dict):
        name = _name(keys)
        if keys.get("quant_method") == "afpq":
            advice = "afpq export it first"
        elif name == "bitsandbytes":
            advice += ", or keep these weights with afpq import"
    raise AfpqError(f"{directory}: already quantized ({name}); {advice}")


def _name(keys: dict[str, Any]) -> str:
    if keys.get("load_in_8bit"):
        return "LLM.int8, load_in_8bit of bitsandbytes"
    if keys.get("load_in_4bit"):
        return "bitsandbytes"
    method = keys.get("quant_method")
    if method is None:
        return "by a method that its config.json does not name"
    if method == "compressed-tensors":
        return f"compressed-tensors, {str(keys.get('format'))[:80]}"
    return str(method)[:80]


def _compressed_blocks(directory: Path, keys: dict[str, Any]) -> list[Block] | None:
    """The blocks that compressed-tensors' groups name; None where any of them is not plain, symmetric float8."""
    groups = keys.get("config_groups")
    blocks = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or (group.get("format") or keys.get("format")) not in FORMATS:
            return None
        if weights.get("type") != "float" or weights.get("num_bits") != 8 or not weights.get("symmetric", True):
            return None
        blocks.append(weights.get("block_structure"))
        if isinstance(weights.get("group_size"), int):
            blocks.append([1, weights["group_size"]])
    return _blocks(directory, blocks) if groups else None


def _blocks(directory: Path, named: list[Any]) -> list[Block]:
    """Pairs of positive numbers, once each. Raises AfpqError for anything else."""
    found = []
    for block in named:
        if block is None:
            continue
        numbers = [n for n in block if isinstance(n, int) and n > 0] if isinstance(block, list) else []
        if len(numbers) != 2:
            raise AfpqError(f"{directory}: {str(block)[:80]} in its {KEY} is no shape of a block of weights")
        found.append((numbers[0], numbers[1]))
    return list(dict.fromkeys(found))
