// SPDX-License-Identifier: MIT
// AVX2: from packed codes to vectors of float32 weights. In an anonymous namespace, as avx2.h.
#pragma once

#include "avx2.h"

namespace afpq {
namespace {

// A unit -> 8 lanes whose low bits are codes 4 * lane; `BITS` further up is the next code

template <int BITS> inline __m256i lanes(__m128i unit);

template <> inline __m256i lanes<4>(__m128i unit) { return _mm256_cvtepu16_epi32(unit); }

template <> inline __m256i lanes<2>(__m128i unit) { return _mm256_cvtepu8_epi32(unit); }

// Lane l is bits 12 l .. 12 l + 11: from byte 3 l / 2, shifted by 4 where l is odd.
template <> inline __m256i lanes<3>(__m128i unit) {
    const __m256i place = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, //
                                           6, 7, -1, -1, 7, 8, -1, -1, 9, 10, -1, -1, 10, 11, -1, -1);
    const __m256i both = _mm256_broadcastsi128_si256(unit);
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(both, place), _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
}

// The 2^BITS weights a group's codes stand for. `vpermps` reads three bits of each index and ignores the others, so
// that 8 entries need no mask, 4 entries are stored twice, and 16 are two tables and a choice by bit 3.
template <int BITS> struct Table {
    __m256 low, high;
    inline __m256 operator[](__m256i code) const {
        const __m256 w = _mm256_permutevar8x32_ps(low, code);
        if constexpr (BITS < 4) return w;
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        return _mm256_blendv_ps(w, _mm256_permutevar8x32_ps(high, code), choice);
    }
};

// The code book, its positive and its negative side. With zero points the "negative side" is -1, times zero * scale.
template <int BITS> struct Book {
    Table<BITS> positive, negative;
    explicit Book(const Weight &w) {
        alignas(32) float sides[2][16];
        for (int i = 0; i < 16; i++) {
            const int code = i & ((1 << BITS) - 1);
            const float value = w.zeros ? static_cast<float>(code) : w.book[code];
            sides[0][i] = value >= 0 ? value : 0;
            sides[1][i] = w.zeros ? -1 : value < 0 ? value : 0;
        }
        positive = {_mm256_load_ps(sides[0]), _mm256_load_ps(sides[0] + 8)};
        negative = {_mm256_load_ps(sides[1]), _mm256_load_ps(sides[1] + 8)};
    }
    inline Table<BITS> scaled(float pos, float neg) const {
        const __m256 p = _mm256_set1_ps(pos), n = _mm256_set1_ps(neg);
        Table<BITS> t;
        t.low = _mm256_fmadd_ps(positive.low, p, _mm256_mul_ps(negative.low, n));
        if constexpr (BITS == 4) t.high = _mm256_fmadd_ps(positive.high, p, _mm256_mul_ps(negative.high, n));
        return t;
    }
};

// Four bits: a look-up in 16 floats costs two `vpermps` (two micro-operations each on Zen) and a choice for 8 weights.
// Looking bytes up by `vpshufb`, 32 weights at a time, and weaving them into floats takes half of that.
struct FloatPlanes {
    __m256i byte[4]; // of 16 floats, in both halves (or those of another group in the upper half)
};

struct PlaneBook {
    Book<4> book; // entries 0-3, 8-11 | 4-7, 12-15, the order in which unpacking by halves keeps them together
    explicit PlaneBook(const Weight &w) : book(w) {
        reorder(book.positive);
        reorder(book.negative);
    }
    static void reorder(Table<4> &t) {
        const __m256 low = t.low, high = t.high;
        t.low = _mm256_permute2f128_ps(low, high, 0x20);
        t.high = _mm256_permute2f128_ps(low, high, 0x31);
    }
    inline FloatPlanes scaled(float pos, float neg) const {
        const Table<4> t = book.scaled(pos, neg);
        const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, //
                                                0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i low = _mm256_shuffle_epi8(_mm256_castps_si256(t.low), gather);
        const __m256i high = _mm256_shuffle_epi8(_mm256_castps_si256(t.high), gather);
        const __m256i ab = _mm256_unpacklo_epi32(low, high), cd = _mm256_unpackhi_epi32(low, high);
        return {{_mm256_permute4x64_epi64(ab, 0x88), _mm256_permute4x64_epi64(ab, 0xdd),
                 _mm256_permute4x64_epi64(cd, 0x88), _mm256_permute4x64_epi64(cd, 0xdd)}};
    }
};

template <class Use> inline void weave(const FloatPlanes &table, __m256i codes, int64_t at, Use use) {
    __m256i b[4];
    for (int p = 0; p < 4; p++) b[p] = _mm256_shuffle_epi8(table.byte[p], codes);
    const __m256i low = _mm256_unpacklo_epi8(b[0], b[1]), high = _mm256_unpacklo_epi8(b[2], b[3]);
    use(at, 0, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high)));
    use(at + 8, 1, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high)));
    const __m256i low2 = _mm256_unpackhi_epi8(b[0], b[1]), high2 = _mm256_unpackhi_epi8(b[2], b[3]);
    use(at + 16, 2, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low2, high2)));
    use(at + 24, 3, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low2, high2)));
}

// Calls use(place among the permuted inputs, 0..3, vector of weights) for units [first, last) of a row, first even.
template <int BITS> struct Decoder {
    Book<BITS> book;
    explicit Decoder(const Weight &w) : book(w) {}

    template <class End, class Use>
    inline void run(const Weight &w, const uint8_t *codes, End end, const float *pos, const float *neg, int64_t first,
                    int64_t last, Use use) const {
        const int64_t span = w.groups == 1 ? last : w.group / UNIT;
        for (int64_t unit = first; unit < last;) {
            const int64_t g = unit / span, stop = (g + 1) * span < last ? (g + 1) * span : last;
            const Table<BITS> table = book.scaled(pos[g], neg[g]);
            for (; unit < stop; unit++) {
                const __m256i v = lanes<BITS>(load_unit(codes + unit * UNIT_BYTES<BITS>, end));
                use(unit * UNIT, 0, table[v]);
                use(unit * UNIT + 8, 1, table[_mm256_srli_epi32(v, BITS)]);
                use(unit * UNIT + 16, 2, table[_mm256_srli_epi32(v, 2 * BITS)]);
                use(unit * UNIT + 24, 3, table[_mm256_srli_epi32(v, 3 * BITS)]);
            }
        }
    }
};

template <> struct Decoder<4> {
    PlaneBook book;
    explicit Decoder(const Weight &w) : book(w) {}

    template <class End, class Use>
    inline void run(const Weight &w, const uint8_t *codes, End end, const float *pos, const float *neg, int64_t first,
                    int64_t last, Use use) const {
        const int64_t span = w.groups == 1 ? last + 1 : w.group / UNIT;
        const __m256i nibble = _mm256_set1_epi8(15);
        int64_t g = -1, h = -1; // groups of the low and the high half of `table`
        FloatPlanes table = {};
        for (int64_t unit = first; unit < last; unit += 2) {
            const int64_t low = unit / span, next = (unit + 1) / span, high = next < w.groups ? next : low;
            if (low != g || high != h) {
                table = book.scaled(pos[low], neg[low]);
                if (high != low) {
                    const FloatPlanes upper = book.scaled(pos[high], neg[high]);
                    for (int p = 0; p < 4; p++) table.byte[p] = _mm256_blend_epi32(table.byte[p], upper.byte[p], 0xf0);
                }
                g = low, h = high;
            }
            const __m256i v = load_pair(codes + unit * UNIT_BYTES<4>, end);
            weave(table, _mm256_and_si256(v, nibble), unit * UNIT, use);
            weave(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble), unit * UNIT + 32, use);
        }
    }
};

} // namespace
} // namespace afpq
