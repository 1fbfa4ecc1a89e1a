# SPDX-License-Identifier: MIT
"""Read 4-bit weights as bitsandbytes saves them, without bitsandbytes, into our layout.

`NAME.weight` holds the codes, two per byte with the first in the high half, `NAME.weight.quant_map` the value of each
code, `.absmax` a scale for each block and `.quant_state.bitsandbytes__nf4` or `__fp4` JSON as bytes. Double
quantization makes absmax bytes: codes of `.nested_quant_map`, scaled by `.nested_absmax`, plus an offset from the JSON.

Blocks run over the flattened weight and may cross its rows. If a row is no multiple of a block, groups of their
greatest common divisor lie inside one block each, so nothing is ever rounded: a block's scale is only repeated.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afpq.checkpoint.reader import Checkpoint
from afpq.errors import AfpqError
from afpq.numerics.formats import FORMATS, Format, custom_format
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme

STATE_SUFFIX = ".quant_state.bitsandbytes__"
PART_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES_OF_STATES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MIN_GROUP_SIZE = 16  # below, the repeated scales would take more than 2 bits for each weight


@dataclass(frozen=True)
class BnbWeight:
    """A packed weight of a checkpoint: its tensor, the fields of its state, and `parts`, the tensors it consists of.

    `shape` is [out, in]; `nested` is (block size of the scales' own scales, offset) if the scales are quantized too.
    """

    tensor: str
    kind: str
    blocksize: int
    shape: tuple[int, int]
    dtype: torch.dtype
    nested: tuple[int, float] | None
    parts: tuple[str, ...]

    @property
    def group_size(self) -> int:
        """The number of adjacent weights of a row that always share a block."""
        return math.gcd(self.shape[1], self.blocksize)

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


def find_weights(checkpoint: Checkpoint) -> dict[str, BnbWeight]:
    """Find every 4-bit weight by its tensor's name; reads only their states, some 100 bytes each.

    Raises AfpqError, naming the tensor, for a state that cannot be read or tensors that do not fit it.
    """
    found = {}
    for name in checkpoint.tensors:
        tensor, separator, kind = name.partition(STATE_SUFFIX)
        if separator:
            found[tensor] = _described(checkpoint, tensor, kind, name)
    return found


def _described(checkpoint: Checkpoint, tensor: str, kind: str, state: str) -> BnbWeight:
    keys = _read_state(checkpoint, state)
    parts = [name for part in PART_SUFFIXES if (name := f"{tensor}.{part}") in checkpoint.tensors]
    try:
        nested = (int(keys["nested_blocksize"]), float(keys["nested_offset"])) if "nested_blocksize" in keys else None
        out_features, in_features = (int(size) for size in keys["shape"])
        dtype = DTYPES_OF_STATES[keys["dtype"]]
        size = int(keys["blocksize"])
        weight = BnbWeight(tensor, kind, size, (out_features, in_features), dtype, nested, (tensor, *parts, state))
    except (KeyError, TypeError, ValueError) as error:
        raise AfpqError(f"tensor {state}: not a state of bitsandbytes ({type(error).__name__}: {error})") from None
    _check(checkpoint, weight)
    return weight


def _read_state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        keys = json.loads(bytes(checkpoint.read(name).flatten().tolist()))
    except ValueError as error:
        raise AfpqError(f"tensor {name}: not readable as JSON: {error}") from None
    if not isinstance(keys, dict):
        raise AfpqError(f"tensor {name}: expected a JSON object")
    return keys


def _check(checkpoint: Checkpoint, weight: BnbWeight) -> None:
    """Check that the tensors exist and have the sizes that the state requires."""
    if min(weight.blocksize, *weight.shape, *(weight.nested or (1,))[:1]) < 1:
        raise AfpqError(f"tensor {weight.tensor}: blocks of {weight.blocksize} in {weight.shape} make no sense")
    blocks = -(-weight.elements // weight.blocksize)
    wanted = {"": -(-weight.elements // 2), ".quant_map": 4 * 16, ".absmax": blocks * (1 if weight.nested else 4)}
    if weight.nested:
        wanted |= {".nested_absmax": 4 * -(-blocks // weight.nested[0]), ".nested_quant_map": 4 * 256}
    for part, size in wanted.items():
        info = checkpoint.tensors.get(weight.tensor + part)
        if info is None or info.bytes != size:
            found = "is not in the checkpoint" if info is None else f"has {info.bytes} bytes"
            raise AfpqError(f"tensor {weight.tensor}{part}: {found}; {weight.shape} in bitsandbytes needs {size}")
    if weight.group_size < MIN_GROUP_SIZE:
        raise AfpqError(
            f"tensor {weight.tensor}: rows of {weight.shape[1]} weights and blocks of {weight.blocksize} have only "
            f"groups of {weight.group_size} in common; quantize the original model instead"
        )


def read_absmax(checkpoint: Checkpoint, weight: BnbWeight) -> Tensor:
    """Read the blocks' scales as bitsandbytes computes them, float32 [blocks]. Raises AfpqError for NaN or Inf."""
    absmax = checkpoint.read(f"{weight.tensor}.absmax")
    if weight.nested is not None:
        size, offset = weight.nested
        outer = checkpoint.read(f"{weight.tensor}.nested_absmax").repeat_interleave(size)[: len(absmax)]
        absmax = checkpoint.read(f"{weight.tensor}.nested_quant_map")[absmax.long()] * outer + offset
    if not bool(torch.isfinite(absmax).all()):
        raise AfpqError(f"tensor {weight.tensor}.absmax: contains NaN or Inf")
    return absmax


def fits_float16(absmax: Tensor) -> bool:
    """Whether float16 holds these scales exactly, as for a float16 model without double quantization."""
    return torch.equal(absmax.half().float(), absmax)


def read_format(checkpoint: Checkpoint, weight: BnbWeight) -> tuple[Format, Tensor]:
    """Return (the codebook, bitsandbytes' code -> ours as uint8 [16]); nf4, or a format with the values in its name.

    Our codebooks ascend and have one zero; fp4 of bitsandbytes has another order, and -0. Its values are written with 9
    digits, the most that float32 needs.
    """
    table = checkpoint.read(f"{weight.tensor}.quant_map")
    values, codes = torch.unique(table + 0.0, sorted=True, return_inverse=True)  # + 0.0 turns -0.0 into 0.0
    nf4 = FORMATS["nf4"]
    if torch.equal(values, torch.tensor(nf4.values)):
        return nf4, codes.to(torch.uint8)
    try:
        return custom_format([float(f"{value:.9g}") for value in values.tolist()]), codes.to(torch.uint8)
    except AfpqError as error:
        raise AfpqError(f"tensor {weight.tensor}.quant_map: {error}") from None


def read_weight(checkpoint: Checkpoint, weight: BnbWeight, scheme: Scheme) -> QuantizedWeight:
    """Read a weight into our layout: exactly the same values if the scheme's scales can hold them, else rounded.

    `scheme` has the weight's format and group size, is symmetric, and stores its scales as floats.
    """
    packed = checkpoint.read(weight.tensor).flatten().view(torch.uint8)  # whatever its declared dtype
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[: weight.elements]
    codes = read_format(checkpoint, weight)[1][codes.int()].view(weight.shape)
    firsts = torch.arange(0, weight.elements, weight.group_size)
    scales = read_absmax(checkpoint, weight)[firsts // weight.blocksize].view(weight.shape[0], -1)
    empty = scales == 0  # a group of zeros: ours has scale 1 and the code of zero
    if scheme.format.has_zero and bool(empty.any()):
        codes[empty.repeat_interleave(weight.group_size, -1)] = scheme.format.values.index(0.0)
        scales = torch.where(empty, 1.0, scales)
    saved = scales.to(scheme.storage.dtype)
    if not bool(torch.isfinite(saved).all()):
        raise AfpqError(f"tensor {weight.tensor}.absmax: {float(scales.max()):.4g} is too large for float16 scales")
    return QuantizedWeight(codes, GroupScales(saved, saved), scheme)
