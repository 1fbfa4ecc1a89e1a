# SPDX-License-Identifier: MIT
"""The native library: its weights and functions in Python's terms, and the choice of an instruction set.

`AFPQ_ISA=name` forces one of ISAS; else the best one that agrees with the portable code on this machine is used.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.kernels.operands import BOOKS, Packed
from afpq.numerics.packing import packed_size

LIBRARY = Path(__file__).with_name("libafpq_cpu.so")
ISAS = ("amx", "avx512", "avx2", "portable")  # the best first
WIDTHS = (2, 3, 4)  # bits of a code
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of inputs and outputs; `Kind` of csrc/afpq.h
SCALE_KINDS = {**KINDS, torch.uint8: 3}
_ERRORS = {1: "out of memory", 2: "bad argument"}


class Weight(ctypes.Structure):
    """A weight as the library reads it: `struct Weight` of csrc/afpq.h, which states shapes; the library sets the rest.

    Addresses do not keep tensors alive: whoever calls the library does.
    """

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("codes", "pos", "neg", "zeros", "grid")),
        ("book", ctypes.POINTER(ctypes.c_float)),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "groups", "row_bytes", "zero_bytes")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_kind")),
        *((name, ctypes.c_void_p) for name in ("levels", "end")),  # null
    ]
    rows: int
    columns: int


class NativeLibrary:
    """The loaded library and the instruction set in use. Raises OSError if it cannot be loaded."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(LIBRARY))
        if not hasattr(self.library, "afpq_weight_bytes") or self.library.afpq_weight_bytes() != ctypes.sizeof(Weight):
            raise OSError("it was built from other sources; build it again")
        pointer, whole, number, weight = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.POINTER(Weight)
        self.library.afpq_linear.argtypes = [weight, pointer, number, whole, pointer, pointer, number]
        self.library.afpq_dequantize.argtypes = [weight, whole, whole, number, pointer]
        self.library.afpq_read.argtypes = [pointer, whole]
        self.library.afpq_read.restype = ctypes.c_uint64
        self.library.afpq_set_parallel.argtypes = [pointer]
        self._use_threads()
        self.isa = "portable"
        wanted = os.environ.get("AFPQ_ISA")
        for name in ISAS if wanted is None else (wanted,):
            if self.select(name) and (wanted or self._agrees_with_portable()):
                return
        raise AfpqError(f"AFPQ_ISA={wanted}: not known, not built, or not for this processor; unset it")

    def _use_threads(self) -> None:
        """Hand over torch's threads; warn if it has none to share with other libraries."""
        function = _torch_parallel_for()
        self.library.afpq_set_parallel(function)
        if function is None and torch.get_num_threads() > 1:
            warnings.warn(
                f"torch {torch.__version__} has no torch_parallel_for, so afpq's CPU kernels run on one thread of "
                f"{torch.get_num_threads()}; install torch 2.10 or later to use them all",
                stacklevel=2,
            )

    def select(self, name: str) -> bool:
        """Use an instruction set (one of ISAS) from now on; return False if it cannot run here."""
        if name not in ISAS or self.library.afpq_select(name.encode()) != 0:
            return False
        self.isa = name
        return True

    def _agrees_with_portable(self) -> bool:
        """Compare one small product for each width: an untested processor must not give wrong answers silently."""
        name, codes = self.isa, torch.arange(0, 24 * 512, 7, dtype=torch.int32).to(torch.uint8)
        x = torch.sin(torch.arange(2 * 256.0)).view(2, 256)
        for bits in WIDTHS:
            qweight = codes[: 8 * packed_size(256, bits)].view(8, -1).clone()
            scales, scales_neg = torch.linspace(0.5, 2, 16).view(8, 2), torch.linspace(2, 0.5, 16).view(8, 2)
            book = torch.linspace(-1, 1, 2**bits).tolist()
            weight = describe(Packed(qweight, scales, scales_neg, None, None, book, bits, 128), 256)
            assert weight is not None
            results = []
            for isa, int8 in ((name, 0), (name, 1), ("portable", 0)):
                self.select(isa)
                y = torch.empty(2, 8)
                check_error(self.library.afpq_linear(weight, x.data_ptr(), 0, 2, None, y.data_ptr(), int8))
                results.append(y)
            self.select(name)
            size = results[2].abs().max()
            if not all((y - results[2]).abs().max() <= bound * size for y, bound in zip(results, (1e-5, 0.1))):
                warnings.warn(f"afpq's {name} kernels compute wrong results on this machine; not used", stacklevel=2)
                return False
        return True


def _torch_parallel_for() -> int | None:
    """Return the address of torch's C function for threads (torch 2.10 and later), or None."""
    directory = Path(torch.__file__).parent / "lib"
    for path in directory.glob("libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


@lru_cache(maxsize=1)
def native() -> NativeLibrary | None:
    """Return the library, loaded at first use, or None if it cannot be. Raises AfpqError for a bad AFPQ_ISA."""
    if not LIBRARY.exists():
        warnings.warn(
            "afpq's native CPU kernels were not built (is there a C++ compiler?); using the slow reference",
            stacklevel=2,
        )
        return None
    try:
        return NativeLibrary()
    except OSError as error:
        warnings.warn(f"afpq's native CPU kernels cannot be loaded ({error}); using the slow reference", stacklevel=2)
        return None


@lru_cache(maxsize=BOOKS)
def _book(values: tuple[float, ...], bits: int) -> ctypes.Array[ctypes.c_float]:
    """Return the codebook as C floats, with zeros for codes that do not occur."""
    book: ctypes.Array[ctypes.c_float] = (ctypes.c_float * 2**bits)(*values)
    return book


def describe(weight: Packed, columns: int) -> Weight | None:
    """Describe a weight to the library; None if the reference has to compute it.

    Raises AfpqError if the tensors do not fit together, since native code would read past their ends.
    """
    qweight, scales, scales_neg, zeros, grid, codebook, bits, group_size = weight
    groups, zero_bytes = weight.check(columns)
    if bits not in WIDTHS or scales.dtype not in SCALE_KINDS:
        return None
    rows, row_bytes = qweight.shape
    group = columns if group_size == -1 else group_size
    for tensor in (qweight, scales, scales_neg, zeros, grid):
        if tensor is not None and not tensor.is_contiguous():
            return None
    return Weight(  # by position, which costs a call half of what names do
        qweight.data_ptr(),
        scales.data_ptr(),
        None if scales_neg is None else scales_neg.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        None if grid is None else grid.data_ptr(),
        _book(tuple(codebook), bits),
        *(rows, columns, min(group, columns), groups, row_bytes, zero_bytes, bits, SCALE_KINDS[scales.dtype]),
    )


def check_error(error: int) -> None:
    """Raise AfpqError for what a function of the library returns, unless it is 0."""
    if error:
        raise AfpqError(f"native kernel: {_ERRORS.get(error, error)}")


def read(words: Tensor) -> int:
    """Read a contiguous int64 tensor with torch's threads, as fast as memory allows; for benchmarks."""
    library = native()
    if library is None:
        raise AfpqError("the native library is not built")
    return int(library.library.afpq_read(words.data_ptr(), words.numel()))
