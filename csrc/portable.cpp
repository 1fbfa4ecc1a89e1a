// SPDX-License-Identifier: MIT
// Plain C++: any instruction set, any group size. Computes what the fast kernels do not take.
#include "afpq.h"
#include "float16.h"
#include "scratch.h"

#include <cstring>

namespace afpq {
namespace {

float load(const void *in, Kind kind, int64_t i) {
    if (kind == FLOAT32) return static_cast<const float *>(in)[i];
    const uint16_t bits = static_cast<const uint16_t *>(in)[i];
    return kind == FLOAT16 ? half_to_float(bits) : bf16_to_float(bits);
}

float scale_at(const Weight &w, const void *scales, int64_t i) {
    return w.levels ? w.levels[static_cast<const uint8_t *>(scales)[i]] : load(scales, w.scale_kind, i);
}

// Code i of a little-endian bit stream; `size` bytes may be read.
uint32_t code_at(const uint8_t *packed, int64_t size, int32_t bits, int64_t i) {
    const int64_t bit = i * bits, byte = bit / 8;
    const uint32_t two = packed[byte] | (byte + 1 < size ? static_cast<uint32_t>(packed[byte + 1]) << 8 : 0);
    return two >> (bit % 8) & ((1u << bits) - 1);
}

// Group by group: the weights its codes stand for, then its codes. out[column - first] for columns [first, last).
void decode_row(const Weight &w, int64_t row, float *out) {
    const uint8_t *codes = w.codes + row * w.row_bytes;
    const int32_t size = 1 << w.bits;
    for (int64_t g = 0; g < w.groups; g++) {
        const float pos = scale_at(w, w.pos, row * w.groups + g);
        const float neg = scale_at(w, w.neg, row * w.groups + g);
        const uint32_t zero = w.zeros ? code_at(w.zeros + g * w.zero_bytes, w.zero_bytes, w.bits, row) : 0;
        float table[16];
        for (int32_t i = 0; i < size; i++)
            table[i] = w.zeros ? static_cast<float>(i - static_cast<int32_t>(zero)) * pos
                               : w.book[i] * (w.book[i] < 0 ? neg : pos);
        const int64_t first = g * w.group, last = first + w.group < w.columns ? first + w.group : w.columns;
        for (int64_t k = first; k < last; k++) out[k] = table[code_at(codes, w.row_bytes, w.bits, k)];
    }
}

void permute_exact(const float *in, float *out, int64_t count, int32_t) {
    memcpy(out, in, static_cast<size_t>(4 * count));
}

Error exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Scratch<float> decoded(w.columns);
    if (!decoded) return NO_MEMORY;
    const float *row_of_w = decoded.data;
    for (int64_t row = begin; row < end; row++) {
        decode_row(w, row, decoded.data);
        for (int64_t t = 0; t < in.tokens; t++) {
            const float *x = in.x + t * in.stride;
            float partial[8] = {}, total = 0; // eight sums: they fit vector units, and they lose less
            int64_t k = 0;
            for (; k + 8 <= w.columns; k += 8)
                for (int i = 0; i < 8; i++) partial[i] += row_of_w[k + i] * x[k + i];
            for (; k < w.columns; k++) total += row_of_w[k] * x[k];
            for (float p : partial) total += p;
            y[t * w.rows + row] = total;
        }
    }
    return DONE;
}

Error dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    for (int64_t row = begin; row < end; row++) decode_row(w, row, out + (row - begin) * w.columns);
    return DONE;
}

void to_float(const void *in, Kind kind, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = load(in, kind, i);
}

void from_float(const float *in, void *out, Kind kind, int64_t count) {
    if (kind == FLOAT32) {
        memcpy(out, in, static_cast<size_t>(4 * count));
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(out);
    for (int64_t i = 0; i < count; i++) to[i] = kind == FLOAT16 ? float_to_half(in[i]) : float_to_bf16(in[i]);
}

const Kernels TABLE = {"portable", 0,       permute_exact, nullptr,    exact,    nullptr,
                       nullptr,    nullptr, dequantize,    to_float, from_float};

} // namespace

const Kernels *portable_kernels() { return &TABLE; }

} // namespace afpq
