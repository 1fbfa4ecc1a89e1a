// SPDX-License-Identifier: MIT
// AVX2: weights in natural order as float32, and the table of what AVX2 offers.
#include "../afpq.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2_decode.h"

namespace afpq {
namespace {

// Lane l of vector j is column 4 l + j: a transposition of 8 x 4.
template <int BITS> inline void store_unit(const Table<BITS> &table, __m256i v, float *to) {
    const __m256 w0 = table[v], w1 = table[_mm256_srli_epi32(v, BITS)];
    const __m256 w2 = table[_mm256_srli_epi32(v, 2 * BITS)], w3 = table[_mm256_srli_epi32(v, 3 * BITS)];
    const __m256 a = _mm256_unpacklo_ps(w0, w1), b = _mm256_unpackhi_ps(w0, w1);
    const __m256 c = _mm256_unpacklo_ps(w2, w3), d = _mm256_unpackhi_ps(w2, w3);
    const __m256 e = _mm256_shuffle_ps(a, c, 0x44), f = _mm256_shuffle_ps(a, c, 0xee);
    const __m256 g = _mm256_shuffle_ps(b, d, 0x44), h = _mm256_shuffle_ps(b, d, 0xee);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(e, f, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(g, h, 0x20));
    _mm256_storeu_ps(to + 16, _mm256_permute2f128_ps(e, f, 0x31));
    _mm256_storeu_ps(to + 24, _mm256_permute2f128_ps(g, h, 0x31));
}

template <int BITS> Error dequantize_bits(const Weight &w, int64_t begin, int64_t end, float *out) {
    const Book<BITS> book(w);
    Zeros zeros(w);
    const Scratch<float> scales(2 * w.groups);
    if (!zeros || !scales) return NO_MEMORY;
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT, span = w.groups == 1 ? units : w.group / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, zeros, row, pos, neg);
        float *to = out + (row - begin) * w.columns;
        for (int64_t unit = 0; unit < units;) {
            const int64_t g = unit / span, stop = (g + 1) * span < units ? (g + 1) * span : units;
            const Table<BITS> table = book.scaled(pos[g], neg[g]);
            for (; unit < stop; unit++) {
                const uint8_t *at = w.codes + row * w.row_bytes + unit * UNIT_BYTES<BITS>;
                const int64_t left = w.columns - unit * UNIT;
                alignas(32) float last[UNIT];
                float *place = left >= UNIT ? to + unit * UNIT : last;
                store_unit<BITS>(table, lanes<BITS>(load_unit(at, w.end)), place);
                if (left < UNIT) memcpy(to + unit * UNIT, last, static_cast<size_t>(4 * left));
            }
        }
    }
    return DONE;
}

} // namespace

namespace avx2 {

Error dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    return by_bits(w.bits, [&](auto bits) { return dequantize_bits<bits>(w, begin, end, out); });
}

} // namespace avx2

const Kernels *avx2_kernels() {
    static const Kernels table = {
        "avx2",     avx2::MOST_TOKENS, avx2::permute_exact, avx2::permute_int8, avx2::exact, avx2::int8, nullptr,
        nullptr, avx2::dequantize,  to_float,            from_float};
    return &table;
}

} // namespace afpq

#else

namespace afpq {
const Kernels *avx2_kernels() { return nullptr; }
} // namespace afpq

#endif
