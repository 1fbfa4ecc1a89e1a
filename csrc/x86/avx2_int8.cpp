// SPDX-License-Identifier: MIT
// AVX2, int8 arithmetic for few tokens: as fast as memory, at an error of about 1 % of the outputs' size. Inputs of 8
// bits times weights of 7 bits and an offset.
#include "../afpq.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2_int8_tables.h"

namespace afpq {
namespace {

// The codes of two units as bytes to look up, the first unit in the low halves and the second in the high halves.
struct Codes {
    __m256i first, second;
};

template <class End> inline Codes codes4(const uint8_t *pair, End end) {
    const __m256i v = load_pair(pair, end), nibble = _mm256_set1_epi8(15);
    return {_mm256_and_si256(v, nibble), _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble)};
}

template <class End> inline Codes codes2(const uint8_t *pair, End end) {
    const __m256i v = _mm256_cvtepu8_epi16(load_unit(pair, end)), mask = _mm256_set1_epi16(0x0303);
    return {_mm256_and_si256(_mm256_or_si256(v, _mm256_slli_epi16(v, 6)), mask),
            _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(v, 4), _mm256_slli_epi16(v, 2)), mask)};
}

// A word for two codes, 6 bits: fetch the two bytes that hold them, shift right by multiplying high (there is no shift
// by a different amount for each word), and move the upper code into the upper byte. Words begin 6 bits apart: at bit
// 0, 6, 4, 2 of bytes 0, 0, 1, 2, and three bytes on it repeats. Bit 0 counts as bit 8 of the byte before.
template <class End> inline Codes codes3(const uint8_t *pair, End end) {
    const __m256i v = _mm256_set_m128i(load_unit(pair + 12, end), load_unit(pair, end));
    const __m256i place[2] = {_mm256_setr_epi8(-1, 0, 0, 1, 1, 2, 2, -1, 2, 3, 3, 4, 4, 5, 5, -1, //
                                               -1, 0, 0, 1, 1, 2, 2, -1, 2, 3, 3, 4, 4, 5, 5, -1),
                              _mm256_setr_epi8(5, 6, 6, 7, 7, 8, 8, -1, 8, 9, 9, 10, 10, 11, 11, -1, //
                                               5, 6, 6, 7, 7, 8, 8, -1, 8, 9, 9, 10, 10, 11, 11, -1)};
    const __m256i shift = _mm256_setr_epi16(1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 8, 1 << 10, 1 << 12, 1 << 14, //
                                            1 << 8, 1 << 10, 1 << 12, 1 << 14, 1 << 8, 1 << 10, 1 << 12, 1 << 14);
    const __m256i mask = _mm256_set1_epi8(7), upper = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
    __m256i out[2];
    for (int i = 0; i < 2; i++) {
        const __m256i low = _mm256_mulhi_epu16(_mm256_shuffle_epi8(v, place[i]), shift);
        out[i] = _mm256_and_si256(_mm256_blendv_epi8(low, _mm256_slli_epi16(low, 5), upper), mask);
    }
    return {out[0], out[1]};
}

template <int BITS, class End> inline Codes codes_of(const uint8_t *pair, End end) {
    if constexpr (BITS == 4) return codes4(pair, end);
    if constexpr (BITS == 3) return codes3(pair, end);
    return codes2(pair, end);
}
// Which code of its unit is byte e (0..15) of vector v (first, second) of `codes_of`.
template <int BITS> constexpr int place_of(int v, int e) {
    return BITS == 4 ? 2 * e + v : BITS == 3 ? 16 * v + e : 4 * (e / 2) + 2 * v + e % 2;
}

template <int BITS> void permute_bits(const int8_t *in, int8_t *out, int64_t count) {
    for (int64_t first = 0; first < count; first += 2 * UNIT)
        for (int v = 0; v < 2; v++)
            for (int half = 0; half < 2; half++)
                for (int e = 0; e < 16; e++)
                    out[first + 32 * v + 16 * half + e] = in[first + UNIT * half + place_of<BITS>(v, e)];
}

// sums[t] += the products of a pair of units with each token, in 8 partial sums.
template <int T> inline void dot(Codes codes, __m256i table, const int8_t *q, int64_t stride, __m256i *sums) {
    const __m256i w0 = _mm256_shuffle_epi8(table, codes.first), w1 = _mm256_shuffle_epi8(table, codes.second);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < T; t++) {
        const __m256i *x = reinterpret_cast<const __m256i *>(q + t * stride);
        const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(w0, x[0]), ones);
        const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(w1, x[1]), ones);
        sums[t] = _mm256_add_epi32(sums[t], _mm256_add_epi32(low, high));
    }
}

struct Int8Scales { // of one row; arrays padded to whole vectors
    float *unit, *neg;
    int32_t *number;
};

// One row whose groups are whole CHUNKs (or one for the row). Behind the last column inputs are zero, so that the codes
// there do not matter.
template <int BITS, int T, class End>
inline void int8_row(const Weight &w, const Tables &tables, const Inputs &in, const uint8_t *codes, End end,
                     Int8Scales s, __m256 *acc) {
    constexpr int64_t PAIRS = CHUNK / (2 * UNIT), BYTES = 2 * UNIT_BYTES<BITS>;
    const int64_t chunks = in.stride / CHUNK, span = w.groups == 1 ? chunks : w.group / CHUNK;
    const int8_t *q = in.q;
    for (int64_t c = 0, g = 0; c < chunks; g++) {
        const __m256i table = tables[s.number[g]];
        const __m256 unit = _mm256_broadcast_ss(s.unit + g);
        for (const int64_t stop = c + span < chunks ? c + span : chunks; c < stop; c++) {
            __m256i sums[T];
            for (int t = 0; t < T; t++) sums[t] = _mm256_setzero_si256();
            for (int64_t i = 0; i < PAIRS; i++)
                dot<T>(codes_of<BITS>(codes + i * BYTES, end), table, q + i * 2 * UNIT, in.stride, sums);
            for (int t = 0; t < T; t++) {
                const __m256 scale = _mm256_mul_ps(unit, _mm256_broadcast_ss(in.steps + t * chunks + c));
                acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), scale, acc[t]);
            }
            codes += PAIRS * BYTES;
            q += CHUNK;
        }
    }
}

// One row of shorter groups, any multiple of UNIT: each half of a pair has a table of its own.
template <int BITS, int T, class End>
inline void int8_short_row(const Weight &w, const Tables &tables, const Inputs &in, const uint8_t *codes, End end,
                           Int8Scales s, __m256 *acc) {
    constexpr int64_t PAIRS = CHUNK / (2 * UNIT), BYTES = 2 * UNIT_BYTES<BITS>;
    const int64_t units = (w.columns + UNIT - 1) / UNIT, span = w.group / UNIT, chunks = in.stride / CHUNK;
    int64_t low = 0, left = span; // group of the next unit, units left in it
    const auto next = [&]() {
        const int64_t g = low;
        if (--left == 0 && low + 1 < w.groups) low++, left = span;
        return g;
    };
    for (int64_t p = 0; 2 * p < units; p++) {
        const int64_t a = next(), b = next();
        const __m256i table = _mm256_blend_epi32(tables[s.number[a]], tables[s.number[b]], 0xf0);
        __m256i sums[T];
        for (int t = 0; t < T; t++) sums[t] = _mm256_setzero_si256();
        dot<T>(codes_of<BITS>(codes + p * BYTES, end), table, in.q + p * 2 * UNIT, in.stride, sums);
        const __m256 unit = _mm256_set_m128(_mm_broadcast_ss(s.unit + b), _mm_broadcast_ss(s.unit + a));
        for (int t = 0; t < T; t++) {
            const __m256 scale = _mm256_mul_ps(unit, _mm256_broadcast_ss(in.steps + t * chunks + p / PAIRS));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), scale, acc[t]);
        }
    }
}

template <int BITS, int T>
inline void int8_any_row(const Weight &w, const Tables &tables, const Inputs &in, const uint8_t *codes, Int8Scales s,
                         __m256 *acc) {
    const bool whole = w.groups == 1 || w.group % CHUNK == 0, far = far_from_end<BITS>(w, codes, in.stride / UNIT);
    if (whole && far) return int8_row<BITS, T>(w, tables, in, codes, Anywhere(), s, acc);
    if (whole) return int8_row<BITS, T>(w, tables, in, codes, w.end, s, acc);
    if (far) return int8_short_row<BITS, T>(w, tables, in, codes, Anywhere(), s, acc);
    int8_short_row<BITS, T>(w, tables, in, codes, w.end, s, acc);
}

template <int BITS, int T>
Error int8_tokens(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Tables tables(w);
    Zeros zeros(w);
    const int64_t padded = (w.groups + 7) / 8 * 8;
    const Scratch<float> scratch((3 + T) * padded);
    if (!zeros || !scratch) return NO_MEMORY;
    const Int8Scales s = {scratch.data, scratch.data + padded, reinterpret_cast<int32_t *>(scratch.data + 2 * padded)};
    float *input_sums = scratch.data + 3 * padded;
    memset(scratch.data, 0, static_cast<size_t>(4 * (3 + T) * padded));
    for (int t = 0; t < T; t++)
        memcpy(input_sums + t * padded, in.sums + t * w.groups, static_cast<size_t>(4 * w.groups));
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = w.codes + row * w.row_bytes;
        table_numbers(w, tables, zeros, row, s.unit, s.number, s.neg);
        __m256 acc[T];
        for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_ps();
        int8_any_row<BITS, T>(w, tables, in, codes, s, acc);
        for (int t = 0; t < T; t++) { // take off what storing the weights unsigned added
            __m256 offset = _mm256_setzero_ps();
            for (int64_t g = 0; g < padded; g += 8)
                offset = _mm256_fmadd_ps(_mm256_load_ps(s.unit + g), _mm256_load_ps(input_sums + t * padded + g),
                                         offset);
            y[t * w.rows + row] = sum(_mm256_fnmadd_ps(offset, _mm256_set1_ps(OFFSET), acc[t]));
        }
    }
    return DONE;
}

} // namespace

namespace avx2 {

void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits) {
    by_bits(bits, [&](auto bits) { permute_bits<bits>(in, out, count); });
}

Error int8(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    return by_bits(w.bits, [&](auto bits) {
        return by_count<MOST_TOKENS>(in.tokens, [&](auto tokens) {
            return int8_tokens<bits, tokens>(w, in, begin, end, y);
        });
    });
}

} // namespace avx2
} // namespace afpq

#endif
