# SPDX-License-Identifier: MIT
"""Codes <-> bytes, and the one saved layout of a quantized weight. All byte tensors are uint8.

The last dimension, k = 0, 1, 2, ..., is one little-endian stream of bits: code k is bits `bits * k` and up. So 8 bits
are a code a byte, 4 bits two (the even k in the low nibble), 2 bits four, 3 bits eight codes in three bytes, and any
other width up to 8 the fewest codes that fill whole bytes. A row that does not fill its last such unit is padded with
zeros. CPU kernels read this as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scale_storage import ScaleGrid, decode_stored, grid_tensor
from afpq.numerics.scheme import Scheme

Spec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor

# 8 fields of 3 bits, a byte each, become 24 bits in three steps, each joining neighbours: (shift, mask of 64 bits)
_JOIN_3 = ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0x0000000000FFFFFF))
_PART_3 = ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))


def spec_bytes(spec: Spec) -> int:
    """Count the bytes of a tensor of this dtype and shape."""
    return spec[0].itemsize * torch.Size(spec[1]).numel()


def _unit(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the smallest whole unit, at most 8 of either."""
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8


def packed_size(count: int, bits: int) -> int:
    """Count the bytes of `count` codes."""
    codes, size = _unit(bits)
    return -(-count // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., n] of values < 2^bits, bits 1 .. 8, into uint8 [..., packed_size(n, bits)]."""
    unit, size = _unit(bits)
    codes = pad(codes, (0, -codes.shape[-1] % unit)).contiguous()
    if not torch.compiler.is_compiling() and codes.storage_offset() % 8:  # cannot be viewed as wider integers
        codes = codes.clone()
    rows = codes.shape[:-1]
    if bits == 8:
        return codes
    if bits == 4:
        pairs = codes.flatten().view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8).view(*rows, -1)
    if bits == 2:
        fours = codes.flatten().view(torch.int32)
        return (fours | fours >> 6 | fours >> 12 | fours >> 18).to(torch.uint8).view(*rows, -1)
    if bits == 3:
        words = codes.flatten().view(torch.int64).view(*rows, -1)
        for shift, mask in _JOIN_3:
            words = (words | words >> shift) & mask
    else:
        fields = codes.unflatten(-1, (-1, unit)).long()
        words = sum((fields[..., k] << bits * k for k in range(1, unit)), fields[..., 0]).contiguous()
    return words.view(torch.uint8).view(*rows, -1, 8)[..., :size].flatten(-2)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack`: uint8 [..., packed_size(count, bits)] -> uint8 [..., count]."""
    if packed.numel() == 0:  # has no strides to view it by
        return packed.new_empty((*packed.shape[:-1], count))
    if bits == 8:
        codes = packed
    elif bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    elif bits == 2:
        codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)
    else:
        unit, size = _unit(bits)
        words = pad(packed.unflatten(-1, (-1, size)), (0, 8 - size)).view(torch.int64)
        if bits == 3:
            words = words.squeeze(-1)
            for shift, mask in _PART_3:
                words = (words | words << shift) & mask
            codes = words.view(torch.uint8)
        else:
            shifts = torch.arange(unit, device=packed.device) * bits
            codes = (words >> shifts & (1 << bits) - 1).to(torch.uint8).flatten(-2)
    return codes[..., :count]


def codes_at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Return the codes at some places of the last dimension: uint8 [..., bytes], int64 [n] -> uint8 [..., n]."""
    first = index * bits
    low = packed.index_select(-1, first // 8).int()
    high = packed.index_select(-1, (first // 8 + 1).clamp(max=packed.shape[-1] - 1)).int()  # some lie in two
    return ((low | high << 8) >> first % 8 & (1 << bits) - 1).to(torch.uint8)


def layout(scheme: Scheme, out_features: int, in_features: int) -> dict[str, Spec]:
    """Map the name of every tensor saved for a weight [out_features, in_features] to its (dtype, shape).

    These are `qweight`, `scales_pos` + `scales_neg` if the scheme has two scales, `scales` if it has one, `scale_grid`
    if their storage needs a grid, and `zeros` (packed along the rows, so that one more group never costs a padded
    word) if it has zero points.
    """
    groups, bits = scheme.groups(in_features), scheme.format.bits
    scale: Spec = (scheme.storage.dtype, (out_features, groups))
    tensors: dict[str, Spec] = {"qweight": (torch.uint8, (out_features, packed_size(in_features, bits)))}
    tensors |= dict.fromkeys(("scales_pos", "scales_neg") if scheme.two_scales else ("scales",), scale)
    if scheme.storage.needs_grid:
        tensors["scale_grid"] = (torch.float32, (2,))
    if scheme.zero_point:
        tensors["zeros"] = (torch.uint8, (groups, packed_size(out_features, bits)))
    return tensors


def packed_bytes(scheme: Scheme, out_features: int, in_features: int) -> int:
    """Count the bytes of all that is saved for a weight: its tensors, and its codebook if that is written out."""
    return sum(map(spec_bytes, layout(scheme, out_features, in_features).values())) + scheme.format.codebook_bytes


def to_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors that are saved, named and shaped as in `layout`."""
    scheme, scales, bits = weight.scheme, weight.scales, weight.scheme.format.bits
    tensors = {"qweight": pack(weight.codes, bits)}
    sides = {"scales_pos": scales.pos, "scales_neg": scales.neg} if scheme.two_scales else {"scales": scales.pos}
    tensors |= {name: scheme.storage.encode(side, scales.grid) for name, side in sides.items()}
    if scales.grid is not None:
        tensors["scale_grid"] = grid_tensor(scales.grid).to(weight.codes.device)
    if scales.zero is not None:
        tensors["zeros"] = pack(scales.zero.T, bits)
    return tensors


def scales_of(
    scales: Tensor, scales_neg: Tensor | None, zeros: Tensor | None, grid: Tensor | None, bits: int
) -> GroupScales:
    """Decode saved scale tensors, shaped as in `layout` (`grid` float32 [2]), to GroupScales [out, groups].

    `GroupScales.grid` stays None, since reading a grid's numbers would wait for the device.
    """
    zero = None if zeros is None else unpack(zeros, bits, scales.shape[0]).T
    pos = decode_stored(scales, grid)
    return GroupScales(pos, pos if scales_neg is None else decode_stored(scales_neg, grid), zero)


def from_tensors(tensors: dict[str, Tensor], scheme: Scheme, in_features: int) -> QuantizedWeight:
    """Invert `to_tensors`."""
    bits = scheme.format.bits
    pos, grid = tensors["scales_pos" if scheme.two_scales else "scales"], tensors.get("scale_grid")
    scales = scales_of(pos, tensors.get("scales_neg"), tensors.get("zeros"), grid, bits)
    if grid is not None:
        scales = replace(scales, grid=ScaleGrid(*grid.tolist()))
    return QuantizedWeight(unpack(tensors["qweight"], bits, in_features), scales, scheme)
