// SPDX-License-Identifier: MIT
// Plain C++: any instruction set, any group size. What the fast kernels do not take comes here.
#include "afpq.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace afpq {
namespace {

float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) { // zero and subnormal numbers: fraction * 2^-24
        const float value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_half(float value) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;  // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00; // rounds to infinity
    if (bits < 0x38800000) {                      // subnormal: the addition rounds to multiples of 2^-24
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
}

float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_bf16(float value) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000; // rounding up could turn it into infinity
    return static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

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

void exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    float *row_of_w = static_cast<float *>(malloc(static_cast<size_t>(4 * w.columns)));
    for (int64_t row = begin; row < end; row++) {
        decode_row(w, row, row_of_w);
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
    free(row_of_w);
}

void dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    for (int64_t row = begin; row < end; row++) decode_row(w, row, out + (row - begin) * w.columns);
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
