// SPDX-License-Identifier: MIT
// What the kernels of every instruction set share: plain structs, no library, no inline code that could be compiled
// under one set of flags and called from another (float16.h, scratch.h and dispatch.h are a copy for each file).
//
// A weight is read as it is saved (packing.py): nothing is repacked, so there is never a second copy of a model. Along
// a row, codes are a little-endian bit stream of 2, 3 or 4 bits; 32 codes, a "unit", fill 8, 12 or 16 bytes, so that
// groups of 32, 64, 128, ... begin on whole units. Spread over 8 lanes of 16, 12 or 8 bits, a unit gives each lane four
// consecutive codes; code j of all lanes is one vector's worth of table look-ups, and inputs are permuted to match.
#pragma once

#include <cstdint>

namespace afpq {

constexpr int64_t UNIT = 32;   // codes
constexpr int64_t CHUNK = 128; // inputs that share one step in int8 arithmetic; rows of inputs are padded to it

enum Kind : int32_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, BYTES = 3 }; // BYTES: scales, through a table

enum Error : int32_t { DONE = 0, NO_MEMORY = 1, BAD_ARGUMENT = 2 };

// A packed weight [rows, columns]. Scales may be negative, both of a group together.
// w = book[code] * (book[code] < 0 ? neg : pos), or, with zeros, (code - zero) * pos.
// `Weight` in kernels/cpu.py has the same fields; callers of the C symbols leave the last two null.
struct Weight {
    const uint8_t *codes; // [rows, row_bytes]
    const void *pos;      // [rows, groups] of kind scale_kind
    const void *neg;      // the same; equal to pos if one scale serves both signs (callers may pass null)
    const uint8_t *zeros; // [groups, zero_bytes], packed along the rows; null without zero points
    const float *grid;    // [2], low and step of scales that are bytes; null if scales are floats
    const float *book;    // [2^bits]
    int64_t rows, columns, group, groups, row_bytes, zero_bytes;
    int32_t bits;
    Kind scale_kind;
    const float *levels; // [256], the value of each byte of scales; null if scales are floats
    const uint8_t *end;  // one past the last byte of codes: nothing behind it is read
};

// Inputs of one call, in the order the kernel wants (`permute_*`); zero behind the last column.
struct Inputs {
    const float *x; // exact arithmetic: [tokens, stride]
    // int8 arithmetic: q = round(x / step), one step a token and CHUNK, and the sum of step * q over each group.
    const int8_t *q;    // [tokens, stride]
    const float *steps; // [tokens, stride / CHUNK]
    const float *sums;  // [tokens, groups]
    const uint16_t *half; // bfloat16 arithmetic: what `pack_bf16` made
    int64_t tokens, stride; // stride is a multiple of CHUNK
};

// What one instruction set offers. Every function works on rows [begin, end) of the weight and is called from several
// threads at once, each with rows of its own. Those that need memory return NO_MEMORY if there is none.
struct Kernels {
    const char *name;
    int64_t most_tokens; // that `int8` takes
    // Natural order -> what the kernels below read; count is a multiple of CHUNK.
    void (*permute_exact)(const float *in, float *out, int64_t count, int32_t bits);
    void (*permute_int8)(const int8_t *in, int8_t *out, int64_t count, int32_t bits);
    // y[token * rows + row], float32. `exact` takes any number of tokens.
    Error (*exact)(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
    Error (*int8)(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
    // Products of bfloat16 (weights rounded to it) in float32 sums, for any number of tokens; null without such units.
    // in [tokens, stride], natural order -> out, with room for [tokens rounded up to 16, stride].
    void (*pack_bf16)(const uint16_t *in, uint16_t *out, int64_t tokens, int64_t stride);
    Error (*bf16)(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
    // Rows [begin, end) in natural order, out[row - begin, column].
    Error (*dequantize)(const Weight &, int64_t begin, int64_t end, float *out);
    void (*to_float)(const void *in, Kind kind, float *out, int64_t count);
    void (*from_float)(const float *in, void *out, Kind kind, int64_t count);
};

const Kernels *portable_kernels();
const Kernels *avx2_kernels();   // null if the compiler cannot build them
const Kernels *avx512_kernels();
const Kernels *amx_kernels();

const Kernels *find_kernels(const char *name); // null if they cannot run here

} // namespace afpq
