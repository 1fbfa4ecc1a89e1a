# SPDX-License-Identifier: MIT
"""The device code of the GPU kernels; `gpu.py` decides what runs, and imports this file if Triton is installed.

Weights are read as they are saved: a row is a little-endian stream of bits, 32-bit words here (3 bits: 32 codes in
three words). Two neighbouring codes are one index into a table of pairs, [4^BITS] words of two 16-bit values, so a
lookup decodes two weights and the codebook stays an operand. A tile of weights is the left operand of the tensor
cores, y^T = W x^T, so that up to 16 tokens cost what one costs.

Two scales: w = mean * c + half * |c| with mean = (s+ + s-)/2 and half = (s+ - s-)/2. So up to 16 tokens a group is two
products, C x and |C| x, in float32 with exact code values, and scales are applied to their sums, once a group. For
more tokens, where a second product would cost more than it saves, weights are scaled in the dtype of x instead:
w = s+ max(c, 0) + s- min(c, 0), where one of the two is zero.

`PORTABLE` replaces inline assembly by plain Triton, for the interpreter and other makers' GPUs. `tl.gather` and
`tl.where` for each weight are avoided: they take 2 to 10 times the instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1
PORTABLE = INTERPRETED or torch.version.hip is not None  # assembly is NVIDIA's


def product_dtype(dtype):
    """Return T of `linear` for inputs of this dtype: the same, but the interpreter cannot multiply in bfloat16."""
    if dtype == torch.float16:
        return tl.float16
    return tl.float32 if INTERPRETED else tl.bfloat16


def result_dtype(dtype):
    """Return the dtype that kernels write results in: the same, but the interpreter does not round to bfloat16."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


@triton.jit
def _halves(pairs, index, T: tl.constexpr, PORTABLE: tl.constexpr):
    """Return (even, odd) columns' values in a 16-bit dtype T, from a table of words.

    In assembly, since the compiler sends a `tl.load` on a detour through shared memory.
    """
    if PORTABLE:
        both = tl.load(pairs + index)
    else:
        both = tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.u32 a, $1, 4, $2; ld.global.nc.b32 $0, [a]; }",
            "=r,r,l", [index, pairs.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return both.to(tl.int16).to(T, bitcast=True), (both >> 16).to(tl.int16).to(T, bitcast=True)


@triton.jit
def _floats(pairs, index, PORTABLE: tl.constexpr):
    """Return (even, odd) columns' values in float32, from a table of two floats."""
    if PORTABLE:
        return tl.load(pairs + 2 * index), tl.load(pairs + 2 * index + 1)
    return tl.inline_asm_elementwise(
        "{ .reg .b64 a; mad.wide.u32 a, $2, 8, $3; ld.global.nc.v2.f32 {$0, $1}, [a]; }",
        "=f,=f,r,l", [index, pairs.to(tl.int64)], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _word(q, row, word, row_bytes, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """Load 32 bits of a row of the packed weight, zeros past its end. Rows not aligned to words are read by bytes."""
    inside = word * 4 < row_bytes
    if ALIGNED:
        words = q.to(tl.pointer_type(tl.uint32), bitcast=True) + row * (row_bytes // 4) + word
        if EVEN:
            return tl.load(words, eviction_policy="evict_first")
        return tl.load(words, mask=inside, other=0, eviction_policy="evict_first")
    start = row * row_bytes + word * 4
    bits = tl.load(q + start, mask=inside, other=0).to(tl.uint32)
    for i in tl.static_range(1, 4):
        byte = tl.load(q + start + i, mask=word * 4 + i < row_bytes, other=0).to(tl.uint32)
        bits |= byte << (8 * i)
    return bits


@triton.jit
def _indices(q, row, k, row_bytes, BITS: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr):
    """Return two codes each of columns k .. k + BK of rows [BN, 1], as indices into a table of pairs, [BN, BK / 2].

    A unit of words has 4, 8 or 16 pairs; each join adds a bit of the pair's number, the highest first.
    """
    if BITS == 3:
        unit = k // 32 + tl.arange(0, BK // 32)[None, :]
        a = _word(q, row, 3 * unit, row_bytes, ALIGNED, EVEN)
        b = _word(q, row, 3 * unit + 1, row_bytes, ALIGNED, EVEN)
        c = _word(q, row, 3 * unit + 2, row_bytes, ALIGNED, EVEN)
        e0 = tl.join(tl.join(a, b >> 16), tl.join(a >> 24, c >> 8))
        e1 = tl.join(tl.join(a >> 6, b >> 22), tl.join(a >> 30 | b << 2, c >> 14))
        e2 = tl.join(tl.join(a >> 12, b >> 28 | c << 4), tl.join(b >> 4, c >> 20))
        e3 = tl.join(tl.join(a >> 18, c >> 2), tl.join(b >> 10, c >> 26))
        pairs = tl.join(tl.join(e0, e2), tl.join(e1, e3)) & 63
    elif BITS == 4:
        a = _word(q, row, k // 8 + tl.arange(0, BK // 8)[None, :], row_bytes, ALIGNED, EVEN)
        pairs = tl.join(tl.join(a, a >> 16), tl.join(a >> 8, a >> 24)) & 255
    else:
        a = _word(q, row, k // 16 + tl.arange(0, BK // 16)[None, :], row_bytes, ALIGNED, EVEN)
        e0 = tl.join(tl.join(a, a >> 16), tl.join(a >> 8, a >> 24))
        e1 = tl.join(tl.join(a >> 4, a >> 20), tl.join(a >> 12, a >> 28))
        pairs = tl.join(e0, e1) & 15
    return pairs.reshape(row.shape[0], BK // 2)


@triton.jit
def _zero(zeros, row, group, N, zero_bytes, BITS: tl.constexpr):
    """Load zero points (codes) of a group, [BN]: row r has bits BITS * r and up."""
    byte = row * BITS // 8
    at = zeros + group * zero_bytes + byte
    field = tl.load(at, mask=row < N, other=0).to(tl.int32)
    if BITS == 3:
        field |= tl.load(at + 1, mask=(row < N) & (byte + 1 < zero_bytes), other=0).to(tl.int32) << 8
    return field >> (row * BITS % 8) & (2**BITS - 1)


@triton.jit
def _scale(scales, grid, at):
    """Load scales as float32; a byte is a sign and the k of 2^(low + step * k)."""
    stored = tl.load(scales + at)
    if grid is None:
        scale = stored.to(tl.float32)
    else:
        size = tl.exp2(tl.load(grid) + tl.load(grid + 1) * (stored & 127).to(tl.float32))
        scale = tl.where(stored > 127, -size, size)
    return scale


@triton.jit
def _add_products(
    acc, w, xt, scales, scales_neg, zeros, grid, book, row, group, groups, N, zero_bytes,
    BITS: tl.constexpr, FOLD: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return acc [BN, BM] + the products of code values w [BN, BK] and inputs xt [BK, BM], all of one group.

    With two scales and without FOLD the sums are twice the products: `linear` halves them at the end.
    """
    at = row.to(tl.int64) * groups + group
    pos = _scale(scales, grid, at)[:, None]
    if zeros is not None:
        zero = tl.load(book + _zero(zeros, row, group, N, zero_bytes, BITS))[:, None]
        if FOLD:
            acc = tl.dot(((w - zero.to(T)) * pos.to(T)).to(T), xt, acc)
        else:
            acc += pos * (tl.dot(w, xt) - zero * tl.sum(xt.to(tl.float32), 0)[None, :])
    elif scales_neg is not None:
        neg = _scale(scales_neg, grid, at)[:, None]
        if FOLD:
            nothing = tl.zeros_like(w)
            above, below = tl.maximum(w, nothing), tl.minimum(w, nothing)
            acc = tl.dot((above * pos.to(T) + below * neg.to(T)).to(T), xt, acc)
        else:
            acc += (pos + neg) * tl.dot(w, xt)
            acc += (pos - neg) * tl.dot(tl.abs(w), xt)
    elif FOLD:
        acc = tl.dot((w * pos.to(T)).to(T), xt, acc)
    else:
        acc += pos * tl.dot(w, xt)
    return acc


@triton.jit(do_not_specialize=["M", "groups", "zero_bytes", "steps"])
def linear(
    x, q, scales, scales_neg, zeros, grid, book, pairs, bias, y, sums, arrived,
    M, N, K, row_bytes, groups, zero_bytes, steps,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, FOLD: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, T: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] = x [M, K] w_hat^T + bias.

    A program has BN rows of w_hat, BM tokens and `steps` tiles of BK columns.
    GROUP is a multiple of BK, or 0 for a single group a row. Operands that the scheme does not have are None. Programs
    that share a tile of y leave their sums in `sums` [splits, M, N]; the last to arrive adds them up in order, so
    results do not depend on which one that is, and sets the counter back for the next call. T is the dtype of the
    products, see `product_dtype`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m = tile * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1)  # rows past the end compute the last one again, and are not stored
    row_long = row[:, None].to(tl.int64)
    columns = tl.arange(0, BK)
    dtype = x.dtype.element_ty
    acc = tl.zeros((BN, BM), tl.float32)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BK))
    for step in tl.range(first, last, num_stages=STAGES):
        k = step * BK
        index = _indices(q, row_long, k, row_bytes, BITS, BK, ALIGNED, EVEN)
        even, odd = _halves(pairs, index, dtype, PORTABLE)
        w = tl.join(even, odd).reshape(BN, BK).to(T)
        inside = m[None, :] < M
        if not EVEN:
            inside &= k + columns[:, None] < K
        xt = tl.load(x + m[None, :].to(tl.int64) * K + k + columns[:, None], mask=inside, other=0.0).to(T)
        group = k // GROUP if GROUP else 0
        acc = _add_products(
            acc, w, xt, scales, scales_neg, zeros, grid, book, row, group, groups, N, zero_bytes, BITS, FOLD, T
        )  # fmt: skip
    if scales_neg is not None and not FOLD:
        acc *= 0.5
    stored = (n[:, None] < N) & (m[None, :] < M)
    at = m[None, :].to(tl.int64) * N + n[:, None]
    if SPLIT:
        size = M.to(tl.int64) * N
        tl.store(sums + split * size + at, acc, mask=stored)
        tl.debug_barrier()  # all threads have stored before one of them counts
        counter = arrived + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") < tl.num_programs(1) - 1:
            return
        tl.store(counter, 0)
        acc = tl.zeros((BN, BM), tl.float32)
        for i in range(tl.num_programs(1)):
            acc += tl.load(sums + i * size + at, mask=stored, other=0.0, cache_modifier=".cg")
    if bias is not None:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["first", "rows", "groups", "zero_bytes"])
def dequantize(
    q, scales, scales_neg, zeros, grid, book, pairs, w_hat, first, rows, N, K, row_bytes, groups, zero_bytes,
    BITS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Compute w_hat [rows, K] = rows `first` and up of the weight; any GROUP, or 0 for a single group a row.

    Computed in float32, and rounded once.
    """
    n, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    row = first + tl.minimum(n, rows - 1)
    row_long = row[:, None].to(tl.int64)
    k = tl.program_id(1) * BK
    even, odd = _floats(pairs, _indices(q, row_long, k, row_bytes, BITS, BK, ALIGNED, EVEN), PORTABLE)
    w = tl.join(even, odd).reshape(BN, BK)
    if GROUP == 0:
        group = tl.zeros((1, 1), tl.int32)
    elif GROUP % BK == 0:
        group = tl.zeros((1, 1), tl.int32) + k // GROUP
    else:  # columns past the end may belong to a group that is not there
        group = tl.minimum(columns // GROUP, groups - 1)[None, :]
    at = row_long * groups + group
    pos = _scale(scales, grid, at)
    if zeros is not None:
        zero = _zero(zeros, row[:, None], group, first + rows, zero_bytes, BITS)
        w = (w - tl.load(book + zero)) * pos
    elif scales_neg is not None:
        w *= tl.where(w < 0, _scale(scales_neg, grid, at), pos)
    else:
        w *= pos
    stored = (n[:, None] < rows) & (columns[None, :] < K)
    tl.store(w_hat + n[:, None].to(tl.int64) * K + columns[None, :], w.to(w_hat.dtype.element_ty), mask=stored)
