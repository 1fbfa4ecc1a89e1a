// SPDX-License-Identifier: MIT
// AVX2, int8 arithmetic: the weights of a group's codes as tables of bytes. In an anonymous namespace, as avx2.h.
#pragma once

#include "avx2.h"

namespace afpq {
namespace {

constexpr int OFFSET = 64; // weights are -63..63, stored 1..127: two products with inputs of 127 still fit 16 bits

// The byte tables of all groups there can be. Two scales matter by their ratio, which is rounded to 127ths of the
// larger one: 255 tables, number 127 + neg - pos with the larger of both 127; building a table for each group would
// cost as much as looking up 40 weights. Zero points: 4 * (code - zero), which is exact.
struct Tables {
    alignas(64) uint8_t entries[256][16];
    float step; // of a weight, in units of the larger scale
    bool zeros;

    explicit Tables(const Weight &w) : zeros(w.zeros != nullptr) {
        float largest = 0;
        for (int i = 0; i < 1 << w.bits; i++) largest = std::fmax(largest, std::fabs(w.book[i]));
        const int steps = best_steps(w, largest);
        step = zeros ? 0.25f : largest / static_cast<float>(steps);
        float positive[16], negative[16];
        for (int i = 0; i < 16; i++) {
            const int code = i & ((1 << w.bits) - 1);
            positive[i] = zeros ? 4.0f * code : w.book[code] < 0 ? 0 : w.book[code] / step;
            negative[i] = zeros ? -4.0f : w.book[code] < 0 ? w.book[code] / step : 0;
        }
        const bool one_scale = !zeros && w.neg == w.pos;
        const int last = zeros ? (1 << w.bits) - 1 : one_scale ? EQUAL : 2 * EQUAL;
        for (int n = one_scale ? EQUAL : 0; n <= last; n++) {
            const float pos = zeros ? 1 : n <= EQUAL ? 1 : static_cast<float>(2 * EQUAL - n) / EQUAL;
            const float neg = zeros ? static_cast<float>(n) : n <= EQUAL ? static_cast<float>(n) / EQUAL : 1;
            for (int i = 0; i < 16; i++)
                entries[n][i] = static_cast<uint8_t>(
                    static_cast<int32_t>(positive[i] * pos + negative[i] * neg + (OFFSET + 0.5f)));
        }
    }
    inline __m256i operator[](int32_t n) const {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(entries[n])));
    }
    static constexpr int EQUAL = 127, MOST_STEPS = OFFSET - 1;

  private:
    // Steps up to the largest value, such that the book's values fall near whole ones: exactly, for int and fp books.
    static int best_steps(const Weight &w, float largest) {
        int best = MOST_STEPS;
        float least = INFINITY;
        for (int n = MOST_STEPS; n > MOST_STEPS / 2; n--) {
            float error = 0;
            for (int i = 0; i < 1 << w.bits; i++) {
                const float at = w.book[i] / largest * static_cast<float>(n), off = at - std::nearbyint(at);
                error += off * off / static_cast<float>(n * n);
            }
            if (error < least * 0.999f) best = n, least = error; // not for a difference in rounding alone
        }
        return best;
    }
};

// All bits where both are above zero: zero has no sign that matters.
inline __m256 apart(__m256 p, __m256 n) {
    const __m256 zero = _mm256_setzero_ps();
    return _mm256_and_ps(_mm256_cmp_ps(p, zero, _CMP_GT_OQ), _mm256_cmp_ps(n, zero, _CMP_GT_OQ));
}

// For a row's groups: what one integer step of a weight stands for, and the number of its table.
void table_numbers(const Weight &w, const Tables &tables, Zeros &zeros, int64_t row, float *unit, int32_t *number,
                   float *neg) {
    convert(w, w.pos, row * w.groups, w.groups, unit);
    const __m256 step = _mm256_set1_ps(tables.step);
    if (tables.zeros || w.neg == w.pos) {
        const uint8_t *zero = tables.zeros ? zeros.of(row) : nullptr;
        for (int64_t g = 0; g < w.groups; g++) number[g] = zero ? zero[g] : Tables::EQUAL;
        for (int64_t g = 0; g < w.groups; g += 8) // the arrays are padded to whole vectors
            _mm256_store_ps(unit + g, _mm256_mul_ps(_mm256_load_ps(unit + g), step));
        return;
    }
    convert(w, w.neg, row * w.groups, w.groups, neg);
    const __m256 tiny = _mm256_set1_ps(1e-30f), most = _mm256_set1_ps(Tables::EQUAL), minus = _mm256_set1_ps(-0.0f);
    for (int64_t g = 0; g < w.groups; g += 8) {
        const __m256 signed_p = _mm256_load_ps(unit + g), signed_n = _mm256_load_ps(neg + g);
        const __m256 p = _mm256_andnot_ps(minus, signed_p), n = _mm256_andnot_ps(minus, signed_n);
        const __m256 larger = _mm256_max_ps(p, n), inverse = _mm256_div_ps(most, _mm256_max_ps(larger, tiny));
        const __m256i ratios = _mm256_sub_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(n, inverse)),
                                                _mm256_cvtps_epi32(_mm256_mul_ps(p, inverse)));
        // Damaged scales, NaN, Inf and two signs in a group, must not leave the tables, and must show: unit is NaN.
        const __m256 infinite = _mm256_add_ps(_mm256_sub_ps(p, p), _mm256_sub_ps(n, n));
        const __m256 nan = _mm256_set1_ps(NAN), differ = _mm256_xor_ps(signed_p, signed_n);
        const __m256 damaged = _mm256_blendv_ps(infinite, nan, _mm256_and_ps(differ, apart(p, n)));
        const __m256i clamped = _mm256_max_epi32(_mm256_min_epi32(ratios, _mm256_set1_epi32(Tables::EQUAL)),
                                                 _mm256_set1_epi32(-Tables::EQUAL));
        _mm256_store_si256(reinterpret_cast<__m256i *>(number + g),
                           _mm256_add_epi32(clamped, _mm256_set1_epi32(Tables::EQUAL)));
        const __m256 sign = _mm256_and_ps(minus, signed_p);
        _mm256_store_ps(unit + g, _mm256_fmadd_ps(_mm256_or_ps(larger, sign), step, damaged));
    }
}

} // namespace
} // namespace afpq
