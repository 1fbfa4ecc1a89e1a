// SPDX-License-Identifier: MIT
// AVX-512: weights in natural order as float32, and the table of what AVX-512 offers.
#include "avx512.h"

#ifdef AFPQ_AVX512

namespace afpq {
namespace {

template <int BITS> constexpr Spread<uint32_t> LOWER(BITS, 0);
template <int BITS> constexpr Spread<uint32_t> UPPER(BITS, 16 * BITS);

template <int BITS> Error dequantize_bits(const Weight &w, int64_t begin, int64_t end, float *out) {
    const Book book(w);
    const Scratch<float> scales(2 * w.groups);
    if (!scales) return NO_MEMORY;
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT, span = w.groups == 1 ? units : w.group / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, row, 0, w.groups, pos, neg);
        float *to = out + (row - begin) * w.columns;
        for (int64_t unit = 0; unit < units;) {
            const int64_t g = unit / span, stop = (g + 1) * span < units ? (g + 1) * span : units;
            const __m512 table = book.scaled(pos[g], neg[g]);
            for (; unit < stop; unit++) {
                const __m256i v = load_pair(w.codes + row * w.row_bytes + unit * UNIT_BYTES<BITS>, w.end);
                const __m512 lower = _mm512_permutexvar_ps(LOWER<BITS>(v), table);
                const __m512 upper = _mm512_permutexvar_ps(UPPER<BITS>(v), table);
                const int64_t left = w.columns - unit * UNIT;
                const uint32_t mask = left < UNIT ? (1u << left) - 1 : 0xffffffff;
                _mm512_mask_storeu_ps(to + unit * UNIT, static_cast<__mmask16>(mask), lower);
                _mm512_mask_storeu_ps(to + unit * UNIT + 16, static_cast<__mmask16>(mask >> 16), upper);
            }
        }
    }
    return DONE;
}

} // namespace

namespace avx512 {

Error dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    return by_bits(w.bits, [&](auto bits) { return dequantize_bits<bits>(w, begin, end, out); });
}

} // namespace avx512

const Kernels *avx512_kernels() {
    static const Kernels table = {
        "avx512", avx512::MOST_TOKENS, avx512::permute_exact, avx512::permute_int8, avx512::exact, avx512::int8,
        nullptr,  nullptr,             avx512::dequantize,    to_float,             from_float};
    return &table;
}

} // namespace afpq

#else

namespace afpq {
const Kernels *avx512_kernels() { return nullptr; }
} // namespace afpq

#endif
