# SPDX-License-Identifier: MIT
"""Other quantizers, to measure together with ours: a weight in, an approximation of it out, and the bytes stored.

Their approximations are put into the same float model, so that kernels play no role. Each is imported when it is used,
and only those that are installed are run. Settings are the tools' own defaults or what their users choose most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from afpq.errors import AfpqError, one_line

Approximate = Callable[[Tensor], tuple[Tensor, int]]  # float32 [out, in] -> (the same in float32, bytes stored)


@dataclass(frozen=True)
class Peer:
    """Another tool's scheme. `multiple`: it takes only weights whose rows are a multiple of this long."""

    scheme: str
    package: str
    approximate: Approximate
    multiple: int

    @property
    def version(self) -> str | None:
        """The package's version; None if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _bitsandbytes(weight: Tensor, kind: str, nested: bool) -> tuple[Tensor, int]:
    functional: Any = import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=nested)
    size = packed.nbytes + state.absmax.nbytes
    if state.nested:
        size += state.state2.absmax.nbytes + state.offset.nbytes
    return functional.dequantize_4bit(packed, state), size


def _hqq(weight: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """Quantize with scale and zero point in float16, as its layers hold them."""
    quantizer: Any = import_module("hqq.core.quantize").Quantizer
    packed, meta = quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, compute_dtype=torch.float32, device=str(weight.device)
    )
    halves = {name: meta[name].half() for name in ("scale", "zero")}
    meta |= {name: half.float() for name, half in halves.items()}
    size = packed.nbytes + sum(half.nbytes for half in halves.values())
    return quantizer.dequantize(packed, meta).view(weight.shape), size


def _torchao(weight: Tensor, group: int) -> tuple[Tensor, int]:
    """Round as its 4-bit weight-only schemes for CPUs do: a scale (2 bytes) and a zero point (1) for each group."""
    affine: Any = import_module("torchao.quantization.quant_primitives")
    block, kind = (1, group), affine.MappingType.ASYMMETRIC
    scale, zero = affine.choose_qparams_affine(weight, kind, block, torch.uint8, 0, 15, scale_dtype=torch.float16)
    codes = affine.quantize_affine(weight, block, scale, zero, torch.uint8, 0, 15)
    back: Tensor = affine.dequantize_affine(codes, block, scale, zero, torch.uint8, 0, 15)
    return back.float(), weight.numel() // 2 + 3 * scale.numel()


PEERS = (
    *(
        Peer(
            f"{kind}-b64{'-dq' if nested else ''}", "bitsandbytes", partial(_bitsandbytes, kind=kind, nested=nested), 1
        )
        for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False))
    ),
    *(
        Peer(f"{bits}bit-g{group}", "hqq", partial(_hqq, bits=bits, group=group), group)
        for bits, group in ((4, 64), (4, 128), (3, 64))
    ),
    Peer("int4-asym-g128", "torchao", partial(_torchao, group=128), 128),
)


def installed_peers() -> list[Peer]:
    """Return the peers that can be run here. Raises AfpqError, with what to install, if there are none."""
    found = [peer for peer in PEERS if peer.version is not None]
    if not found:
        names = dict.fromkeys(peer.package for peer in PEERS)
        raise AfpqError(f"--peers: none of {', '.join(names)} is installed here; for example: pip install bitsandbytes")
    return found


def missing_packages() -> list[str]:
    """Return the packages of peers that are not installed."""
    return list(dict.fromkeys(peer.package for peer in PEERS if peer.version is None))


@torch.no_grad()
def approximate(peer: Peer, name: str, weight: Tensor) -> tuple[Tensor, int]:
    """Return (the peer's approximation in the weight's dtype, bytes stored) of the weight of the layer `name`.

    Raises AfpqError that names both if the tool cannot do it.
    """
    if weight.shape[-1] % peer.multiple:
        raise AfpqError(f"{name}: {peer.package} {peer.scheme} cannot divide rows of {weight.shape[-1]} into groups")
    try:
        back, size = peer.approximate(weight.float().contiguous())
    except Exception as error:  # other people's code raises what it likes
        reason = one_line(error)
        raise AfpqError(f"{name}: {peer.package} {peer.scheme} failed: {type(error).__name__}: {reason}") from None
    return back.to(weight.dtype), size
