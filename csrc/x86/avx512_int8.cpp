// SPDX-License-Identifier: MIT
// AVX-512, int8 arithmetic: inputs of 8 bits times weights of 8 bits and an offset. A vector of 64 codes is 16 codes of
// each of the four units of a CHUNK, one in each 128-bit lane, with a table of its own there.
#include "avx512.h"

#ifdef AFPQ_AVX512

namespace afpq {
namespace {

constexpr int OFFSET = 128; // weights are -127..127, stored 1..255

// 64 bytes; near the end of the weight only what is there is read, the rest is zero.
inline __m512i load_chunk(const uint8_t *codes, const uint8_t *end) {
    if (end - codes >= 64) return _mm512_loadu_si512(codes);
    return _mm512_maskz_loadu_epi8((uint64_t(1) << (end - codes)) - 1, codes);
}

struct Codes { // as bytes to look up
    __m512i first, second;
};

// Eight codes fill `bits` bytes: these go into a 64-bit lane each, from which eight unaligned bytes are cut.
struct Cuts {
    alignas(64) uint8_t places[2][64] = {};
    alignas(64) uint8_t shifts[64] = {};
    constexpr explicit Cuts(int bits) {
        for (int i = 0; i < 64; i++) {
            const int unit = i / 16, eight = i % 16 / 8;
            for (int v = 0; v < 2; v++) places[v][i] = static_cast<uint8_t>(bits * (4 * unit + 2 * v + eight) + i % 8);
            shifts[i] = static_cast<uint8_t>(bits * (i % 8));
        }
    }
};

template <int BITS> constexpr Cuts CUTS(BITS);

template <int BITS> inline Codes codes_of(__m512i v) {
    const __m512i mask = _mm512_set1_epi8(15); // `vpshufb` reads four bits, and bit 7
    if constexpr (BITS == 4) return {_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16(v, 4), mask)};
    const __m512i shifts = _mm512_load_si512(CUTS<BITS>.shifts);
    const __m512i first = _mm512_permutexvar_epi8(_mm512_load_si512(CUTS<BITS>.places[0]), v);
    const __m512i second = _mm512_permutexvar_epi8(_mm512_load_si512(CUTS<BITS>.places[1]), v);
    return {_mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, first), mask),
            _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, second), mask)};
}

// The bytes of a group. The scales are in steps of a weight, at most 127; with zero points 1 and zero, all exact.
inline __m128i bytes_of(const Book &book, float pos, float neg) {
    const __m512 below = _mm512_fmadd_ps(book.negative, _mm512_set1_ps(neg), _mm512_set1_ps(OFFSET));
    const __m512 table = _mm512_fmadd_ps(book.positive, _mm512_set1_ps(pos), below);
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(table));
}

// For a row's groups: what one step of a weight stands for, and the scales `bytes_of` takes. Arrays are padded to
// whole vectors.
void step_scales(const Weight &w, float largest, int64_t row, float *step, float *pos, float *neg) {
    if (w.zeros) {
        convert(w, w.pos, row * w.groups, w.groups, step);
        for (int64_t g = 0; g < w.groups; g++) pos[g] = 1, neg[g] = static_cast<float>(zero_at(w, row, g));
        return;
    }
    row_scales(w, row, 0, w.groups, pos, neg);
    const __m512 tiny = _mm512_set1_ps(1e-30f), steps = _mm512_set1_ps(127 / largest), one = _mm512_set1_ps(1);
    for (int64_t g = 0; g < w.groups; g += 16) {
        const __m512 p = _mm512_loadu_ps(pos + g), n = _mm512_loadu_ps(neg + g);
        const __m512 larger = _mm512_max_ps(_mm512_max_ps(_mm512_abs_ps(p), _mm512_abs_ps(n)), tiny);
        const __m512 inverse = _mm512_div_ps(steps, larger);
        _mm512_storeu_ps(pos + g, _mm512_mul_ps(p, inverse));
        _mm512_storeu_ps(neg + g, _mm512_mul_ps(n, inverse));
        // Damaged scales must show: NaN for NaN and Inf.
        const __m512 damaged = _mm512_add_ps(_mm512_sub_ps(p, p), _mm512_sub_ps(n, n));
        _mm512_storeu_ps(step + g, _mm512_add_ps(_mm512_div_ps(one, inverse), damaged));
    }
}

template <int BITS, int T>
inline void int8_row(const Weight &w, const Book &book, const Inputs &in, const uint8_t *codes, const float *step,
                     const float *pos, const float *neg, __m512 *acc) {
    constexpr int64_t UNITS = CHUNK / UNIT;
    const int64_t chunks = in.stride / CHUNK;
    __m512i table = _mm512_setzero_si512();
    __m512 steps = _mm512_setzero_ps();
    __m128i bytes = _mm_setzero_si128(); // the group's
    int64_t g = -1, left = 0;            // units left of the group
    bool mixed = false;                  // the table is not the group's alone
    for (int64_t c = 0; c < chunks; c++, codes += UNITS * UNIT_BYTES<BITS>) {
        for (int64_t unit = 0; unit < UNITS;) {
            const bool next = left == 0;
            if (next) { // the last group also serves behind the last column
                g++;
                left = g + 1 < w.groups ? w.group / UNIT : chunks * UNITS;
                bytes = bytes_of(book, pos[g], neg[g]);
            }
            if (next || mixed) { // from this unit on
                mixed = unit > 0;
                const __mmask16 rest = static_cast<__mmask16>(0xffff << 4 * unit);
                table = _mm512_mask_broadcast_i32x4(table, rest, bytes);
                steps = _mm512_mask_mov_ps(steps, rest, _mm512_set1_ps(step[g]));
            }
            const int64_t same = left < UNITS - unit ? left : UNITS - unit;
            unit += same, left -= same;
        }
        _mm_prefetch(reinterpret_cast<const char *>(codes + AHEAD), _MM_HINT_T0);
        const Codes at = codes_of<BITS>(load_chunk(codes, w.end));
        const __m512i first = _mm512_shuffle_epi8(table, at.first), second = _mm512_shuffle_epi8(table, at.second);
        UNROLL for (int t = 0; t < T; t++) {
            const int8_t *q = in.q + t * in.stride + c * CHUNK;
            __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_loadu_si512(q));
            sums = _mm512_dpbusd_epi32(sums, second, _mm512_loadu_si512(q + 64));
            const __m512 scale = _mm512_mul_ps(steps, _mm512_set1_ps(in.steps[t * chunks + c]));
            acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, acc[t]);
        }
    }
}

template <int BITS, int T>
Error int8_tokens(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    float largest = 1e-6f;
    for (int i = 0; i < 1 << BITS; i++) largest = std::fmax(largest, std::fabs(w.book[i]));
    const int64_t padded = (w.groups + 15) / 16 * 16;
    const Scratch<float> scratch((3 + T) * padded);
    if (!scratch) return NO_MEMORY;
    float *step = scratch.data, *pos = step + padded, *neg = pos + padded, *input_sums = neg + padded;
    memset(scratch.data, 0, static_cast<size_t>(4 * (3 + T) * padded));
    for (int t = 0; t < T; t++)
        memcpy(input_sums + t * padded, in.sums + t * w.groups, static_cast<size_t>(4 * w.groups));
    for (int64_t row = begin; row < end; row++) {
        step_scales(w, largest, row, step, pos, neg);
        __m512 acc[T];
        UNROLL for (int t = 0; t < T; t++) acc[t] = _mm512_setzero_ps();
        int8_row<BITS, T>(w, book, in, w.codes + row * w.row_bytes, step, pos, neg, acc);
        UNROLL for (int t = 0; t < T; t++) { // take off what storing the weights unsigned added
            __m512 offset = _mm512_setzero_ps();
            for (int64_t g = 0; g < padded; g += 16) {
                const __m512 sums = _mm512_loadu_ps(input_sums + t * padded + g);
                offset = _mm512_fmadd_ps(_mm512_loadu_ps(step + g), sums, offset);
            }
            y[t * w.rows + row] = _mm512_reduce_add_ps(_mm512_fnmadd_ps(offset, _mm512_set1_ps(OFFSET), acc[t]));
        }
    }
    return DONE;
}

} // namespace

namespace avx512 {

void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits) {
    for (int64_t first = 0; first < count; first += CHUNK)
        for (int v = 0; v < 2; v++)
            for (int unit = 0; unit < 4; unit++)
                for (int e = 0; e < 16; e++)
                    out[first + 64 * v + 16 * unit + e] =
                        in[first + UNIT * unit + (bits == 4 ? 2 * e + v : 16 * v + e)];
}

Error int8(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    return by_bits(w.bits, [&](auto bits) {
        return by_count<MOST_TOKENS>(in.tokens, [&](auto tokens) {
            return int8_tokens<bits, tokens>(w, in, begin, end, y);
        });
    });
}

} // namespace avx512
} // namespace afpq

#endif
