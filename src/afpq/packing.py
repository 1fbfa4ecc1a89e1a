# SPDX-License-Identifier: MIT
"""Codes <-> bytes, and the one saved layout of a quantized weight. All byte tensors are uint8.

Along the last dimension, k = 0, 1, 2, ...:
  8 bits  one code a byte
  4 bits  two codes a byte, the even k in the low nibble
  2 bits  four codes a byte, the lowest k in the lowest bits
  3 bits  32 codes in 12 bytes: three planes of 4 bytes; bit i of plane p is bit p of code i (little-endian)
A row that does not fill its last byte (or its last 32 codes) is padded with zeros.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from afpq.groups import STORAGE, GroupScales, QuantizedWeight
from afpq.scheme import Scheme

Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor

_UNIT = {2: (4, 1), 3: (32, 12), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of the smallest whole unit

# A 64-bit word holding eight bytes of 0 or 1, times _GATHER, has those eight bits side by side in its top byte.
_ONES = 0x0101010101010101
_GATHER = 0x0102040810204080


def spec_bytes(spec: Spec) -> int:
    """Bytes of a tensor of this dtype and shape."""
    return spec[0].itemsize * torch.Size(spec[1]).numel()


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    codes, size = _UNIT[bits]
    return -(-count // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of values < 2^bits -> uint8 [..., packed_size(n, bits)]."""
    unit = _UNIT[bits][0]
    codes = pad(codes, (0, -codes.shape[-1] % unit)).contiguous()
    if codes.storage_offset() % 8:  # cannot be viewed as wider integers
        codes = codes.clone()
    rows = codes.shape[:-1]
    if bits == 4:
        pairs = codes.flatten().view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8).view(*rows, -1)
    if bits == 2:
        fours = codes.flatten().view(torch.int32)
        return (fours | fours >> 6 | fours >> 12 | fours >> 18).to(torch.uint8).view(*rows, -1)
    if bits == 3:
        eights = codes.flatten().view(torch.int64).view(*rows, -1)
        planes = [((eights >> plane & _ONES) * _GATHER >> 56).to(torch.uint8) for plane in range(3)]
        return torch.stack([p.unflatten(-1, (-1, 4)) for p in planes], -2).flatten(-3)
    return codes


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., packed_size(count, bits)] -> uint8 [..., count]."""
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    elif bits == 2:
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    elif bits == 3:
        planes = _spread(packed.device)[packed.unflatten(-1, (-1, 3, 4)).int()]
        words = planes[..., 0, :] | planes[..., 1, :] << 1 | planes[..., 2, :] << 2
        codes = words.contiguous().view(torch.uint8).flatten(-2)
    else:
        codes = packed
    return codes[..., :count]


@lru_cache(maxsize=8)
def _spread(device: torch.device) -> Tensor:
    """[256] int64: byte -> eight bytes holding its bits, the lowest first."""
    bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.contiguous().view(torch.int64).flatten().to(device)


def layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    """Name -> (dtype, shape) of every tensor saved for a weight [out_features, in_features].

    `scales_pos` + `scales_neg` where the scheme has two scales, `scales` where it has one, and `zeros` (packed along
    the rows, so that a group more never costs a padded word) for zero points.
    """
    groups, bits = scheme.groups(in_features), scheme.format.bits
    scale: Spec = (STORAGE[scheme.scale_dtype][0], (out_features, groups))
    tensors: dict[str, Spec] = {"qweight": (torch.uint8, (out_features, packed_size(in_features, bits)))}
    tensors |= dict.fromkeys(("scales_pos", "scales_neg") if scheme.two_scales else ("scales",), scale)
    if scheme.zero_point:
        tensors["zeros"] = (torch.uint8, (groups, packed_size(out_features, bits)))
    return tensors


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that are saved, named and shaped as `layout` says."""
    scales, bits = weight.scales, weight.scheme.format.bits
    tensors = {"qweight": pack(weight.codes, bits)}
    if weight.scheme.two_scales:
        tensors |= {"scales_pos": scales.pos, "scales_neg": scales.neg}
    else:
        tensors["scales"] = scales.pos
    if scales.zero is not None:
        tensors["zeros"] = pack(scales.zero.T, bits)
    return tensors


def scales_of(scales: Tensor, scales_neg: Tensor | None, zeros: Tensor | None, bits: int) -> GroupScales:
    """Saved scale tensors -> GroupScales."""
    zero = None if zeros is None else unpack(zeros, bits, scales.shape[0]).T
    return GroupScales(scales, scales if scales_neg is None else scales_neg, zero)


def from_tensors(tensors: dict[str, Tensor], scheme: Scheme, in_features: int) -> QuantizedWeight:
    """The inverse of `to_tensors`."""
    bits = scheme.format.bits
    pos = tensors["scales_pos" if scheme.two_scales else "scales"]
    scales = scales_of(pos, tensors.get("scales_neg"), tensors.get("zeros"), bits)
    return QuantizedWeight(unpack(tensors["qweight"], bits, in_features), scales, scheme)
