# SPDX-License-Identifier: MIT
"""The ops on GPUs: chooses among the kernels of `triton_kernels.py`, which read weights as they are saved.

Up to 256 tokens: one fused kernel; more: panels are decoded into the cache and multiplied by torch. Errors, relative to
sum |w x|: values of the code book, and with more than 64 tokens also weights, are rounded to the dtype of x, as the
reference rounds weights; sums are float32, and added in a fixed order. Float32 inputs take decoded panels.
If Triton is not installed, the reference computes everything; a warning states it once.

Works in CUDA graphs: nothing waits for the GPU once a layer has run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.kernels import gpu_counters, reference
from afpq.kernels.gpu_tiles import MOST_TOKENS, Tile, bucket, candidates, fastest, steps_of_a_program, tile_for
from afpq.kernels.operands import Packed

FAST_BITS: tuple[int, ...] = (2, 3, 4)
FAST_SCALES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
DTYPES = (torch.float16, torch.bfloat16)
PANEL = Tile(rows=32, tokens=0, columns=128, warps=4, stages=1)  # decoded by one program
PANEL_ROWS = 128


@cache
def kernels() -> Any:
    """Return the module of kernels, or None if Triton is not installed."""
    try:
        from afpq.kernels import triton_kernels as triton
    except ImportError as error:
        warnings.warn(f"no Triton ({error}): afpq computes slowly on this GPU; pip install triton", stacklevel=2)
        return None
    return triton


@cache  # never given back: captured graphs hold their addresses
def _tables(values: tuple[float, ...], bits: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (values, float32 [2^bits]; values of each two codes, `dtype` [4^bits, 2], the even column's code low)."""
    book = torch.zeros(2**bits)
    book[: len(values)] = torch.tensor(values)
    pairs = torch.stack([book.repeat(2**bits), book.repeat_interleave(2**bits)], -1).to(dtype)
    return book.to(device), (pairs if dtype == torch.float32 else pairs.view(torch.int32)).to(device)


@cache
def _fits_16_bits(values: tuple[float, ...]) -> bool:
    """Return whether a codebook keeps its precision in float16, with room for products."""
    return all(v == 0 or 2.0**-12 <= abs(v) <= 2.0**12 for v in values)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _panel_bytes(device: torch.device) -> int:
    """Return half of the last cache's size: decoded weights stay in it until they are used."""
    return torch.cuda.get_device_properties(device).L2_cache_size // 2 if device.type == "cuda" else 1 << 20


def prepare(values: tuple[float, ...], bits: int, device: torch.device) -> None:
    """See `Kernel.prepare`: the tables of a codebook, and the counters of a GPU."""
    if device.type == "cuda" and bits in FAST_BITS and kernels() is not None:
        for dtype in (*DTYPES, torch.float32):
            _tables(values, bits, dtype, device)
        gpu_counters.reserve(device)


# ---- the choice of a tile

_tuned: dict[tuple[object, ...], Tile] = {}


def _milliseconds(run: Callable[[], object]) -> float | None:
    """Time one call with cold caches; None if it cannot run, mostly for lack of registers or shared memory."""
    import triton

    try:
        return float(triton.testing.do_bench(run, warmup=5, rep=30))
    except Exception:  # the compiler raises many kinds for a tile it cannot build
        return None


def _tile(call: _Call, x: Tensor) -> Tile:
    """Choose a tile from the table; with AFPQ_AUTOTUNE=1 the fastest, measured once for each shape and batch size."""
    capability = _capability(call.device)
    if os.environ.get("AFPQ_AUTOTUNE") != "1":
        return tile_for(capability, len(x))
    kinds = [None if tensor is None else tensor.dtype for tensor in call.tensors]
    key = (call.device, x.dtype, call.bits, call.group, call.aligned, *kinds, *call.sizes(), bucket(len(x)))
    if key not in _tuned:
        if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return tile_for(capability, len(x))
        _tuned[key] = fastest(
            candidates(capability, len(x)), lambda tile: _milliseconds(lambda: call.multiply(x, None, tile))
        )
    return _tuned[key]


# ---- calls


class _Call:
    """One weight described to the kernels."""

    def __init__(self, weight: Packed, columns: int) -> None:
        qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = weight
        self.groups, self.zero_bytes = weight.check(columns)
        for name, tensor in (("scales", scales), ("scales_neg", scales_neg), ("zeros", zeros), ("scale_grid", grid)):
            if tensor is not None and tensor.device != qweight.device:
                raise AfpqError(f"{name} is on {tensor.device}, qweight on {qweight.device}; move the layer as a whole")
        qweight = qweight.contiguous()
        self.tensors = [qweight, *(t if t is None else t.contiguous() for t in (scales, scales_neg, zeros, grid))]
        self.device, self.rows, self.columns, self.bits = qweight.device, len(qweight), columns, bits
        self.row_bytes, self.scale_dtype = qweight.shape[1], scales.dtype
        self.values = tuple(codebook)
        self.group = 0 if self.groups == 1 else group_size
        self.aligned = self.row_bytes % 4 == 0 and qweight.data_ptr() % 4 == 0

    def fusible(self, tokens: int) -> bool:
        """Return whether the fused kernel can compute it: tiles of 32 columns or more in one group each, in 16 bits."""
        if tokens > MOST_TOKENS or self.group % 32 != 0 or not _fits_16_bits(self.values):
            return False
        return self.scale_dtype != torch.float32 or not tile_for(_capability(self.device), tokens).fold

    def sizes(self) -> tuple[int, ...]:
        return self.rows, self.columns, self.row_bytes, self.groups, self.zero_bytes

    def multiply(self, x: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
        """Compute y [tokens, out] from x [tokens, in] by the fused kernel."""
        module, tile = kernels(), tile.within(self.group)
        book, pairs = _tables(self.values, self.bits, x.dtype, self.device)
        tokens, steps = len(x), -(-self.columns // tile.columns)
        tiles = -(-self.rows // tile.rows), -(-tokens // tile.tokens)
        each = steps_of_a_program(tiles[0] * tiles[1], steps, tile.programs, _multiprocessors(self.device))
        splits = -(-steps // each)
        y = x.new_empty(tokens, self.rows, dtype=module.result_dtype(x.dtype))
        sums = arrived = None
        if splits > 1:
            sums = torch.empty(splits, tokens, self.rows, dtype=torch.float32, device=self.device)
            arrived = gpu_counters.counters_for(self.device, tiles[0] * tiles[1])
        module.linear[(tiles[0], splits, tiles[1])](
            x, *self.tensors, book, pairs, bias, y, sums, arrived, tokens, *self.sizes(), each,
            BITS=self.bits, GROUP=self.group, ALIGNED=self.aligned, EVEN=self.columns % tile.columns == 0,
            FOLD=tile.fold, SPLIT=splits > 1, BN=tile.rows, BM=tile.tokens, BK=tile.columns, STAGES=tile.stages,
            T=module.product_dtype(x.dtype), PORTABLE=module.PORTABLE, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y.to(x.dtype)

    def decode(self, first: int, w_hat: Tensor) -> Tensor:
        """Decode rows `first` and up into w_hat [rows, in]."""
        module = kernels()
        if module.result_dtype(w_hat.dtype) != w_hat.dtype:
            return w_hat.copy_(self.decode(first, w_hat.new_empty(w_hat.shape, dtype=module.result_dtype(w_hat.dtype))))
        book, pairs = _tables(self.values, self.bits, torch.float32, self.device)
        grid = (-(-len(w_hat) // PANEL.rows), -(-self.columns // PANEL.columns))
        module.dequantize[grid](
            *self.tensors, book, pairs, w_hat, first, len(w_hat), *self.sizes(), BITS=self.bits, GROUP=self.group,
            ALIGNED=self.aligned, EVEN=self.columns % PANEL.columns == 0, BN=PANEL.rows, BK=PANEL.columns,
            PORTABLE=module.PORTABLE, num_warps=PANEL.warps,
        )  # fmt: skip
        return w_hat

    def panels(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute as `multiply`, for any number of tokens: rows decoded into the last cache, and torch's product."""
        y = x.new_empty(len(x), self.rows)
        size = _panel_bytes(self.device) // (x.element_size() * self.columns)
        size = max(PANEL_ROWS, size // PANEL_ROWS * PANEL_ROWS)  # aligned columns of y, for the fast products
        panel = x.new_empty(min(size, self.rows), self.columns)
        for first in range(0, self.rows, size):
            last = min(first + size, self.rows)
            weight = self.decode(first, panel[: last - first]).T
            if bias is None:
                torch.mm(x, weight, out=y[:, first:last])
            else:
                torch.addmm(bias[first:last], x, weight, out=y[:, first:last])
        return y


def _fast(weight: Packed) -> bool:
    """Return whether there is a kernel for these widths and scales; else the reference computes."""
    return (
        weight.bits in FAST_BITS
        and weight.scales is not None  # the reference refuses it
        and weight.scales.dtype in FAST_SCALES
        and kernels() is not None
    )


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """See `Kernel.linear`. Raises AfpqError for operands that are on different devices too."""
    columns, rows = weight.check_inputs(x, bias), len(weight.qweight)
    if not _fast(weight) or x.dtype not in (*DTYPES, torch.float32) or columns == 0:
        return reference.linear(x, weight, bias)
    call = _Call(weight, columns)
    if x.device != call.device:
        raise AfpqError(f"inputs are on {x.device}, the layer on {call.device}")
    flat = x.reshape(-1, columns).contiguous()
    if flat.numel() == 0 or rows == 0:
        return x.new_empty((*x.shape[:-1], rows))
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    with _on(call.device):
        if x.dtype in DTYPES and call.fusible(len(flat)):
            y = call.multiply(flat, bias, _tile(call, flat))
        else:
            y = call.panels(flat, bias)
    return y.view(*x.shape[:-1], rows)


def dequantize(weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """See `Kernel.dequantize`; equals the reference, except scales on a grid: the GPU computes their power of two."""
    weight.check(in_features)
    rows, device = len(weight.qweight), weight.qweight.device
    if not _fast(weight) or not dtype.is_floating_point or in_features * rows == 0:
        return reference.dequantize(weight, in_features, dtype)
    call = _Call(weight, in_features)
    with _on(call.device):
        return call.decode(0, torch.empty(rows, in_features, dtype=dtype, device=device))
