# SPDX-License-Identifier: MIT
"""Codes <-> bytes, and the one saved layout of a quantized weight. All byte tensors are uint8.

The last dimension, k = 0, 1, 2, ..., is one little-endian stream of bits: code k is bits `bits * k` and up. So 8 bits
are a code a byte, 4 bits two (the even k in the low nibble), 2 bits four, and 3 bits eight codes in three bytes. A row
that does not fill its last byte (3 bits: its last three) is padded with zeros. CPU kernels read this as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from afpq.numerics.groups import GroupScales, QuantizedWeight
from afpq.numerics.scales import STORAGE, from_bytes, grid_tensor, to_bytes
from afpq.numerics.scheme import ScaleGrid, Scheme

Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor

_UNIT = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits -> (codes, bytes) of the smallest whole unit

# 8 fields of 3 bits, a byte each, become 24 bits in three steps, each joining neighbours: (shift, mask of 64 bits)
_JOIN_3 = ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0x0000000000FFFFFF))
_PART_3 = ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))


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
    if not torch.compiler.is_compiling() and codes.storage_offset() % 8:  # cannot be viewed as wider integers
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
        for shift, mask in _JOIN_3:
            eights = (eights | eights >> shift) & mask
        return eights.view(torch.uint8).view(*rows, -1, 8)[..., :3].flatten(-2)
    return codes


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., packed_size(count, bits)] -> uint8 [..., count]."""
    if packed.numel() == 0:  # has no strides to view it by
        return packed.new_empty((*packed.shape[:-1], count))
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    elif bits == 2:
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    elif bits == 3:
        words = pad(packed.unflatten(-1, (-1, 3)), (0, 5)).view(torch.int64).squeeze(-1)
        for shift, mask in _PART_3:
            words = (words | words << shift) & mask
        codes = words.view(torch.uint8)
    else:
        codes = packed
    return codes[..., :count]


def codes_at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Codes at some places of the last dimension: uint8 [..., bytes], int64 [n] -> uint8 [..., n]."""
    first = index * bits
    low = packed.index_select(-1, first // 8).int()
    high = packed.index_select(-1, (first // 8 + 1).clamp(max=packed.shape[-1] - 1)).int()  # of 3 bits, some lie in two
    return ((low | high << 8) >> first % 8 & (1 << bits) - 1).to(torch.uint8)


def layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    """Name -> (dtype, shape) of every tensor saved for a weight [out_features, in_features].

    `scales_pos` + `scales_neg` where the scheme has two scales, `scales` where it has one, and `zeros` (packed along
    the rows, so that a group more never costs a padded word) for zero points; `scale_grid` where scales are bytes.
    """
    groups, bits = scheme.groups(in_features), scheme.format.bits
    scale: Spec = (STORAGE[scheme.scale_dtype][0], (out_features, groups))
    tensors: dict[str, Spec] = {"qweight": (torch.uint8, (out_features, packed_size(in_features, bits)))}
    tensors |= dict.fromkeys(("scales_pos", "scales_neg") if scheme.two_scales else ("scales",), scale)
    if scheme.scale_dtype == "log8":
        tensors["scale_grid"] = (torch.float32, (2,))
    if scheme.zero_point:
        tensors["zeros"] = (torch.uint8, (groups, packed_size(out_features, bits)))
    return tensors


def packed_bytes(scheme: Scheme, out_features: int, in_features: int) -> int:
    """Bytes of all that is saved for a weight: its tensors, and its code book where that is written out."""
    return sum(map(spec_bytes, layout(scheme, out_features, in_features).values())) + scheme.format.codebook_bytes


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that are saved, named and shaped as `layout` says."""
    scales, bits, grid = weight.scales, weight.scheme.format.bits, weight.scheme.grid
    tensors = {"qweight": pack(weight.codes, bits)}
    sides = {"scales_pos": scales.pos, "scales_neg": scales.neg} if weight.scheme.two_scales else {"scales": scales.pos}
    tensors |= sides if grid is None else {name: to_bytes(side, grid) for name, side in sides.items()}
    if grid is not None:
        tensors["scale_grid"] = grid_tensor(grid).to(weight.codes.device)
    if scales.zero is not None:
        tensors["zeros"] = pack(scales.zero.T, bits)
    return tensors


def scales_of(
    scales: Tensor, scales_neg: Tensor | None, zeros: Tensor | None, grid: Tensor | None, bits: int
) -> GroupScales:
    """Saved scale tensors, shaped as `layout` says (`grid` float32 [2]) -> GroupScales [out, groups]."""
    zero = None if zeros is None else unpack(zeros, bits, scales.shape[0]).T
    if grid is not None:
        scales = from_bytes(scales, grid)
        scales_neg = None if scales_neg is None else from_bytes(scales_neg, grid)
    return GroupScales(scales, scales if scales_neg is None else scales_neg, zero)


def from_tensors(tensors: dict[str, Tensor], scheme: Scheme, in_features: int) -> QuantizedWeight:
    """The inverse of `to_tensors`."""
    bits = scheme.format.bits
    pos, grid = tensors["scales_pos" if scheme.two_scales else "scales"], tensors.get("scale_grid")
    scales = scales_of(pos, tensors.get("scales_neg"), tensors.get("zeros"), grid, bits)
    if grid is not None:
        scheme = replace(scheme, grid=ScaleGrid(*grid.tolist()))
    return QuantizedWeight(unpack(tensors["qweight"], bits, in_features), scales, scheme)
