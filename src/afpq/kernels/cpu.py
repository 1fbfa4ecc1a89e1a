# SPDX-License-Identifier: MIT
"""The op on CPUs: checks, and calls into the native library (csrc/), which reads weights as they are saved.

Two arithmetics. "exact": float32 throughout, within 1e-5 of the reference, relative to sum |w x|. "int8": inputs are
rounded to 8 bits, one step for 128 of them, and weights to 7, for up to 6 tokens at a time; more tokens are exact.
Threads are torch's own: the library calls torch_parallel_for, so `torch.set_num_threads` rules it. Where the library
was not built (no compiler) or cannot run, the reference computes everything, and a warning says so once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.kernels import reference
from afpq.kernels.operands import BOOKS, Packed
from afpq.numerics.packing import packed_size

LIBRARY = Path(__file__).with_name("libafpq_cpu.so")
ISAS = ("amx", "avx512", "avx2", "portable")  # the best first
MODES = ("exact", "int8")
BITS = (2, 3, 4)
MANY_TOKENS = 160  # from which on decoding panels for torch's own matrix product is faster
PANEL_BYTES = 4 << 20  # of decoded weights, to stay in a cache

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SCALES = {**_KINDS, torch.uint8: 3}
_ERRORS = {1: "out of memory", 2: "bad argument"}


class _Native:
    """The loaded library and the instruction set in use."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(LIBRARY))
        pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        described = [pointer] * 6 + [whole] * 6 + [number] * 2
        self.library.afpq_linear.argtypes = [*described, pointer, number, whole, pointer, pointer, number]
        self.library.afpq_dequantize.argtypes = [*described, whole, whole, number, pointer]
        self.library.afpq_read.argtypes = [pointer, whole]
        self.library.afpq_read.restype = ctypes.c_uint64
        self.library.afpq_set_parallel.argtypes = [pointer]
        self.library.afpq_set_parallel(_torch_parallel_for())
        self.isa = "portable"
        wanted = os.environ.get("AFPQ_ISA")
        for name in ISAS if wanted is None else (wanted,):
            if self.select(name) and (wanted or self._agrees_with_portable()):
                return
        raise AfpqError(f"AFPQ_ISA={wanted}: not known, not built, or not for this processor; unset it")

    def select(self, name: str) -> bool:
        """Use an instruction set (one of ISAS) from now on; False where it cannot run here."""
        if name not in ISAS or self.library.afpq_select(name.encode()) != 0:
            return False
        self.isa = name
        return True

    def _agrees_with_portable(self) -> bool:
        """One small product for each width: a processor nobody tried must not give wrong answers silently."""
        name, codes = self.isa, torch.arange(0, 24 * 512, 7, dtype=torch.int32).to(torch.uint8)
        x = torch.sin(torch.arange(2 * 256.0)).view(2, 256)
        for bits in BITS:
            qweight = codes[: 8 * packed_size(256, bits)].view(8, -1).clone()
            scales, scales_neg = torch.linspace(0.5, 2, 16).view(8, 2), torch.linspace(2, 0.5, 16).view(8, 2)
            book = torch.linspace(-1, 1, 2**bits).tolist()
            weight = _described(Packed(qweight, scales, scales_neg, None, None, book, bits, 128), 256)
            assert weight is not None
            results = []
            for isa, int8 in ((name, 0), (name, 1), ("portable", 0)):
                self.select(isa)
                y = torch.empty(2, 8)
                _done(self.library.afpq_linear(*weight, x.data_ptr(), 0, 2, None, y.data_ptr(), int8))
                results.append(y)
            self.select(name)
            size = results[2].abs().max()
            if not all((y - results[2]).abs().max() <= bound * size for y, bound in zip(results, (1e-5, 0.1))):
                warnings.warn(f"afpq's {name} kernels compute wrong results on this machine; not used", stacklevel=2)
                return False
        return True


def _torch_parallel_for() -> int | None:
    """Address of torch's C function for threads (torch 2.10 and later); None: one thread."""
    directory = Path(torch.__file__).parent / "lib"
    for path in directory.glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=1)
def native() -> _Native | None:
    """The library, loaded at first use; None where it cannot be. Raises AfpqError for a bad AFPQ_ISA."""
    if sys.platform == "win32" or not LIBRARY.exists():
        warnings.warn(
            "afpq's native CPU kernels were not built (is there a C++ compiler?); using the slow reference",
            stacklevel=2,
        )
        return None
    try:
        return _Native()
    except OSError as error:
        warnings.warn(f"afpq's native CPU kernels cannot be loaded ({error}); using the slow reference", stacklevel=2)
        return None


# ---- arithmetic

_compute = "exact"


def set_compute(mode: str) -> str:
    """Choose the arithmetic of CPU layers, "exact" or "int8", for all threads; returns what it was before.

    Raises AfpqError for another name.
    """
    global _compute
    if mode not in MODES:
        raise AfpqError(f"compute {mode!r}: choose from {', '.join(MODES)}")
    before, _compute = _compute, mode
    return before


# ---- calls


@lru_cache(maxsize=BOOKS)
def _book(values: tuple[float, ...], bits: int) -> Any:
    """The code book as C floats, with zeros for codes that do not occur."""
    return (ctypes.c_float * 2**bits)(*values)


def _described(weight: Packed, columns: int) -> list[Any] | None:
    """The arguments that describe a weight to the library; None where the reference has to do it.

    Raises AfpqError where the tensors do not fit together, since native code would read past their ends.
    """
    qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = weight
    groups, zero_bytes = weight.check(columns)
    if bits not in BITS or scales.dtype not in _SCALES:
        return None
    rows, row_bytes = qweight.shape
    group = columns if group_size == -1 else group_size
    for tensor in (qweight, scales, scales_neg, zeros, grid):
        if tensor is not None and not tensor.is_contiguous():
            return None
    return [
        qweight.data_ptr(),
        scales.data_ptr(),
        None if scales_neg is None else scales_neg.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if grid is None else grid.data_ptr(),
        _book(tuple(codebook), bits),
        *(rows, columns, min(group, columns), groups, row_bytes, zero_bytes, bits, _SCALES[scales.dtype]),
    ]


def _done(error: int) -> None:
    if error:
        raise AfpqError(f"native kernel: {_ERRORS.get(error, error)}")


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """See `reference.linear`; the weight is not rounded to the dtype of x."""
    library = native()
    columns = weight.check_inputs(x, bias)
    described = _described(weight, columns)
    if library is None or described is None or x.dtype not in _KINDS or columns == 0:
        return reference.linear(x, weight, bias)
    x = x.contiguous()
    rows = weight.qweight.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    tokens = x.numel() // columns
    if tokens == 0 or rows == 0:
        return y
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    if tokens >= MANY_TOKENS:
        return _many(library, described, x.view(tokens, columns), bias, y)
    kind = _KINDS[x.dtype]
    address = None if bias is None else bias.data_ptr()
    int8 = _compute == "int8"
    _done(library.library.afpq_linear(*described, x.data_ptr(), kind, tokens, address, y.data_ptr(), int8))
    return y


def _many(library: _Native, described: list[Any], x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """x [tokens, in] times panels of decoded rows, by torch; in float32 where the machine has no faster 16 bits."""
    rows, columns = described[6], described[7]
    dtype = x.dtype if library.isa == "amx" and x.dtype == torch.bfloat16 else torch.float32
    inputs, out = x.to(dtype), y.view(len(x), rows)
    size = max(16, PANEL_BYTES // (dtype.itemsize * columns))
    panel = torch.empty(min(size, rows), columns, dtype=dtype)
    for first in range(0, rows, size):
        last = min(first + size, rows)
        _done(library.library.afpq_dequantize(*described, first, last, _KINDS[dtype], panel.data_ptr()))
        product = inputs @ panel[: last - first].T
        out[:, first:last] = product if bias is None else product.add_(bias[first:last])
    return y


def dequantize(weight: Packed, in_features: int, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    library = native()
    described = _described(weight, in_features)
    if library is None or described is None or dtype not in _KINDS or in_features == 0:
        return reference.dequantize(weight, in_features, dtype)
    rows = weight.qweight.shape[0]
    out = torch.empty(rows, in_features, dtype=dtype)
    _done(library.library.afpq_dequantize(*described, 0, rows, _KINDS[dtype], out.data_ptr()))
    return out


def read(words: Tensor) -> int:
    """Read a contiguous int64 tensor with torch's threads, as fast as memory allows; for benchmarks."""
    library = native()
    if library is None:
        raise AfpqError("the native library is not built")
    return int(library.library.afpq_read(words.data_ptr(), words.numel()))
