// SPDX-License-Identifier: MIT
// What the AVX2 + FMA + F16C kernels share. All of it is in an anonymous namespace, a copy for each file that includes
// it: nothing compiled with these flags may be merged by the linker with code that runs elsewhere.
#pragma once

#include <immintrin.h>

#include "f16c.h"

#include <cmath>
#include <cstring>

namespace afpq {

namespace avx2 { // one file each
constexpr int MOST_TOKENS = 6; // that `int8` takes: their sums, and what they are made of, fit the registers
void permute_exact(const float *in, float *out, int64_t count, int32_t bits);
void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits);
Error exact(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
Error int8(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
Error dequantize(const Weight &, int64_t begin, int64_t end, float *out);
} // namespace avx2

namespace {

// ---- memory

template <int BITS> constexpr int64_t UNIT_BYTES = 4 * BITS;

// 16 bytes that begin with a unit; with an `end`, near it, only what is there is read.
struct Anywhere {}; // in place of `end`: there is enough behind
inline __m128i load_unit(const uint8_t *unit, Anywhere) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(unit));
}
inline __m128i load_unit(const uint8_t *unit, const uint8_t *end) {
    if (unit + 16 <= end) return load_unit(unit, Anywhere());
    alignas(16) uint8_t copy[16] = {};
    if (unit < end) memcpy(copy, unit, static_cast<size_t>(end - unit));
    return _mm_load_si128(reinterpret_cast<const __m128i *>(copy));
}

// Whether reading all of a row's units, rounded up to CHUNKs, stays inside the weight.
template <int BITS> inline bool far_from_end(const Weight &w, const uint8_t *codes, int64_t units) {
    return w.end - codes >= (units + CHUNK / UNIT) * UNIT_BYTES<BITS> + 16;
}

// Two units; in each vector the low half is of the first and the high half of the second.
inline __m256i load_pair(const uint8_t *pair, Anywhere) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pair));
}
inline __m256i load_pair(const uint8_t *pair, const uint8_t *end) {
    return _mm256_set_m128i(load_unit(pair + 16, end), load_unit(pair, end));
}

// ---- scales of one row, float32

// Zero points of a row's groups. They are packed along the rows, far apart for the groups of one row (often in the same
// set of the cache), so they are unpacked for 64 rows at a time. `!zeros` if there is no memory for that.
class Zeros {
  public:
    explicit Zeros(const Weight &w) : w(w), block(w.zeros ? ROWS * w.groups : 1) {}
    bool operator!() const { return !block; }

    const uint8_t *of(int64_t row) {
        if (first < 0 || row < first || row >= first + ROWS) fill(row / ROWS * ROWS);
        return block.data + (row - first) * w.groups;
    }

  private:
    static constexpr int64_t ROWS = 64; // begins on a whole byte for any number of bits

    void fill(int64_t row) {
        first = row;
        const int64_t rows = w.rows - row < ROWS ? w.rows - row : ROWS, offset = row * w.bits / 8;
        for (int64_t g = 0; g < w.groups; g++) {
            const uint8_t *packed = w.zeros + g * w.zero_bytes + offset;
            uint32_t bits = 0;
            for (int64_t r = 0, held = 0; r < rows; r++, held -= w.bits, bits >>= w.bits) {
                if (held < w.bits) bits |= static_cast<uint32_t>(*packed++) << held, held += 8;
                block.data[r * w.groups + g] = static_cast<uint8_t>(bits & ((1u << w.bits) - 1));
            }
        }
    }

    const Weight &w;
    Scratch<uint8_t> block;
    int64_t first = -1;
};

// pos and neg of a row's groups; with zeros, neg becomes zero * scale (exact: 11 bits times 4).
inline void row_scales(const Weight &w, Zeros &zeros, int64_t row, float *pos, float *neg) {
    convert(w, w.pos, row * w.groups, w.groups, pos);
    if (w.zeros) {
        const uint8_t *zero = zeros.of(row);
        for (int64_t g = 0; g < w.groups; g++) neg[g] = static_cast<float>(zero[g]) * pos[g];
    } else if (w.neg != w.pos)
        convert(w, w.neg, row * w.groups, w.groups, neg);
    else
        memcpy(neg, pos, static_cast<size_t>(4 * w.groups));
}

inline float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

} // namespace
} // namespace afpq
