// SPDX-License-Identifier: MIT
// AVX-512 kernels (F, BW, VL, DQ, VNNI, VBMI: Ice Lake, Zen 4 and later). Everything is in an anonymous namespace:
// nothing compiled with these flags may be merged by the linker with code that runs elsewhere.
//
// The tests run this file on any AVX2 machine: with AFPQ_EMULATE the intrinsics are plain loops (tests/csrc).
#include "../afpq.h"

#if defined(AFPQ_EMULATE) || (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) &&               \
                              defined(__AVX512DQ__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) &&          \
                              defined(__FMA__) && defined(__F16C__))
#ifdef AFPQ_EMULATE
#include "emulated.h"
#else
#pragma GCC diagnostic push // GCC 12 warns of what its own header leaves undefined on purpose (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#include "f16c.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#define UNROLL _Pragma("GCC unroll 6") // before arrays of registers are taken apart: otherwise they stay in memory

namespace afpq {
namespace {

// ---- memory

template <int BITS> constexpr int64_t UNIT_BYTES = 4 * BITS;
constexpr int64_t AHEAD = 4096; // bytes of codes to prefetch: a page, where the processor's own prefetching stops

// 32 or 64 bytes; near the end of the weight only what is there is read, the rest is zero.
inline __m256i load_pair(const uint8_t *codes, const uint8_t *end) {
    if (end - codes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes));
    return _mm256_maskz_loadu_epi8((1u << (end - codes)) - 1, codes);
}
inline __m512i load_chunk(const uint8_t *codes, const uint8_t *end) {
    if (end - codes >= 64) return _mm512_loadu_si512(codes);
    return _mm512_maskz_loadu_epi8((uint64_t(1) << (end - codes)) - 1, codes);
}

// ---- decoding, exact: two units -> 16 lanes whose low bits are codes 4 * lane; `BITS` further up is the next code.
// The first unit is in the lower 8 lanes, the second in the upper ones.

// Lane l gets the bytes from bit `first + step * l` on, shifted so that this bit is its lowest.
struct Spread {
    alignas(64) uint8_t bytes[64] = {};
    alignas(64) uint32_t shifts[16] = {};
    constexpr Spread(int step, int first) {
        for (int lane = 0; lane < 16; lane++) {
            const int bit = first + step * lane;
            for (int i = 0; i < 4; i++) bytes[4 * lane + i] = static_cast<uint8_t>(bit / 8 + (i > 0)); // two suffice
            shifts[lane] = static_cast<uint32_t>(bit % 8);
        }
    }
    inline __m512i operator()(__m256i codes) const {
        const __m512i wide = _mm512_permutexvar_epi8(_mm512_load_si512(bytes), _mm512_zextsi256_si512(codes));
        return _mm512_srlv_epi32(wide, _mm512_load_si512(shifts));
    }
};

constexpr Spread TWELVE(12, 0);

template <int BITS> inline __m512i lanes(__m256i pair) {
    if constexpr (BITS == 4) return _mm512_cvtepu16_epi32(pair);
    if constexpr (BITS == 3) return TWELVE(pair);
    return _mm512_cvtepu8_epi32(_mm256_castsi256_si128(pair));
}

// The code book, its positive and its negative side, repeated to 16 entries: `vpermps` reads four bits of each index
// and ignores the others, so that no code needs a mask. With zero points the "negative side" is -1.
struct Book {
    __m512 positive, negative;
    explicit Book(const Weight &w) {
        float sides[2][16];
        for (int i = 0; i < 16; i++) {
            const int code = i & ((1 << w.bits) - 1);
            const float value = w.zeros ? static_cast<float>(code) : w.book[code];
            sides[0][i] = value >= 0 ? value : 0;
            sides[1][i] = w.zeros ? -1 : value < 0 ? value : 0;
        }
        positive = _mm512_loadu_ps(sides[0]);
        negative = _mm512_loadu_ps(sides[1]);
    }
    inline __m512 scaled(float pos, float neg) const { // with zero points, neg is zero * scale
        return _mm512_fmadd_ps(positive, _mm512_set1_ps(pos), _mm512_mul_ps(negative, _mm512_set1_ps(neg)));
    }
};

// ---- scales of one row, float32

int32_t zero_at(const Weight &w, int64_t row, int64_t group) {
    const uint8_t *packed = w.zeros + group * w.zero_bytes;
    const int64_t bit = row * w.bits, byte = bit / 8;
    const uint32_t two = packed[byte] | (byte + 1 < w.zero_bytes ? packed[byte + 1] << 8 : 0);
    return static_cast<int32_t>(two >> (bit % 8) & ((1u << w.bits) - 1));
}

// pos[g] and neg[g] of a row's groups [first, last); with zeros, neg becomes zero * scale (exact: 11 bits times 4).
void row_scales(const Weight &w, int64_t row, int64_t first, int64_t last, float *pos, float *neg) {
    convert(w, w.pos, row * w.groups + first, last - first, pos + first);
    if (w.zeros)
        for (int64_t g = first; g < last; g++) neg[g] = static_cast<float>(zero_at(w, row, g)) * pos[g];
    else if (w.neg != w.pos)
        convert(w, w.neg, row * w.groups + first, last - first, neg + first);
    else
        memcpy(neg + first, pos + first, static_cast<size_t>(4 * (last - first)));
}

// ---- exact arithmetic

// Calls use(place among the permuted inputs, 0..3, vector of weights) for a pair of units. Inlined early, so that what
// `use` refers to, the sums, stays in registers.
template <int BITS, class LookUp, class Use>
__attribute__((always_inline)) inline void decode_pair(const Weight &w, const uint8_t *codes, int64_t unit,
                                                       LookUp look_up, Use use) {
    const uint8_t *at = codes + unit * UNIT_BYTES<BITS>;
    _mm_prefetch(reinterpret_cast<const char *>(at + AHEAD), _MM_HINT_T0);
    const __m512i v = lanes<BITS>(load_pair(at, w.end));
    use(unit * UNIT, 0, look_up(v));
    use(unit * UNIT + 16, 1, look_up(_mm512_srli_epi32(v, BITS)));
    use(unit * UNIT + 32, 2, look_up(_mm512_srli_epi32(v, 2 * BITS)));
    use(unit * UNIT + 48, 3, look_up(_mm512_srli_epi32(v, 3 * BITS)));
}

// The same for units [first, last) of a row, first even.
template <int BITS, class Use>
__attribute__((always_inline)) inline void decode(const Weight &w, const Book &book, const uint8_t *codes,
                                                  const float *pos, const float *neg, int64_t first, int64_t last,
                                                  Use use) {
    const int64_t span = w.groups == 1 ? last : w.group / UNIT;
    for (int64_t unit = first; unit < last;) {
        const int64_t g = unit / span, stop = (g + 1) * span < last ? (g + 1) * span : last;
        const __m512 table = book.scaled(pos[g], neg[g]);
        const auto look_up = [table](__m512i v) { return _mm512_permutexvar_ps(v, table); };
        for (; unit + 2 <= stop; unit += 2) decode_pair<BITS>(w, codes, unit, look_up, use);
        if (unit == stop) continue;
        // The group ends within a pair: its upper half is of the next group, or behind the last column.
        const int64_t next = unit + 1 < last ? g + 1 : g;
        const __m512 upper = book.scaled(pos[next], neg[next]);
        const auto look_up_both = [table, upper](__m512i v) {
            return _mm512_mask_permutexvar_ps(_mm512_permutexvar_ps(v, table), 0xff00, v, upper);
        };
        decode_pair<BITS>(w, codes, unit, look_up_both, use);
        unit += 2;
    }
}

void permute_exact(const float *in, float *out, int64_t count, int32_t) {
    for (int64_t first = 0; first < count; first += 2 * UNIT)
        for (int64_t j = 0; j < 4; j++)
            for (int64_t lane = 0; lane < 16; lane++) out[first + 16 * j + lane] = in[first + 4 * lane + j];
}

template <int BITS> void exact_one(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    const Scratch scales(2 * w.groups);
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, row, 0, w.groups, pos, neg);
        __m512 acc[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        const auto use = [&](int64_t at, int i, __m512 weights) {
            acc[i] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(in.x + at), acc[i]);
        };
        decode<BITS>(w, book, w.codes + row * w.row_bytes, pos, neg, 0, units, use);
        y[row] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])));
    }
}

constexpr int64_t ROWS = 4;    // decoded side by side
constexpr int64_t TOKENS = 6;  // times ROWS sums, TOKENS inputs and a weight: 31 of 32 registers
constexpr int64_t PANEL = 32;  // units: 4 rows of 1024 weights take half of the first-level cache,
constexpr int64_t BLOCK = 96;  // tokens: and their inputs less than half of the second-level one, while all rows pass

inline __m256 halves(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// y[token, row] += dot products of R decoded rows with T tokens over `count` inputs.
template <int64_t R, int64_t T>
inline void tile(const float *weights, const float *x, int64_t stride, int64_t count, float *y, int64_t y_stride) {
    __m512 acc[R][T];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < T; t++) acc[r][t] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 16) {
        __m512 v[T];
        UNROLL for (int t = 0; t < T; t++) v[t] = _mm512_loadu_ps(x + t * stride + k);
        UNROLL for (int r = 0; r < R; r++) {
            const __m512 u = _mm512_load_ps(weights + r * count + k);
            UNROLL for (int t = 0; t < T; t++) acc[r][t] = _mm512_fmadd_ps(u, v[t], acc[r][t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
        if constexpr (R == 4) { // four sums at once, neighbours in y
            const __m256 ab = _mm256_hadd_ps(halves(acc[0][t]), halves(acc[1][t]));
            const __m256 cd = _mm256_hadd_ps(halves(acc[2][t]), halves(acc[3][t])), sums = _mm256_hadd_ps(ab, cd);
            const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
            _mm_storeu_ps(y + t * y_stride, _mm_add_ps(_mm_loadu_ps(y + t * y_stride), four));
        } else {
            UNROLL for (int r = 0; r < R; r++) y[t * y_stride + r] += _mm512_reduce_add_ps(acc[r][t]);
        }
    }
}

template <int64_t R>
void tiles(const float *weights, const float *x, int64_t stride, int64_t tokens, int64_t count, float *y,
           int64_t rows) {
    for (; tokens >= TOKENS; tokens -= TOKENS, x += TOKENS * stride, y += TOKENS * rows)
        tile<R, TOKENS>(weights, x, stride, count, y, rows);
    if (tokens == 5) tile<R, 5>(weights, x, stride, count, y, rows);
    if (tokens == 4) tile<R, 4>(weights, x, stride, count, y, rows);
    if (tokens == 3) tile<R, 3>(weights, x, stride, count, y, rows);
    if (tokens == 2) tile<R, 2>(weights, x, stride, count, y, rows);
    if (tokens == 1) tile<R, 1>(weights, x, stride, count, y, rows);
}

// Units [first, last) of all rows times some tokens.
template <int BITS>
void exact_panel(const Weight &w, const Book &book, const Inputs &in, int64_t begin, int64_t end, int64_t first,
                 int64_t last, const float *x, int64_t tokens, float *pos, float *neg, float *decoded, float *y) {
    const int64_t count = (last - first + 1) / 2 * 2 * UNIT; // whole pairs: x is zero behind the end
    const int64_t span = w.groups == 1 ? last : w.group / UNIT;
    for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t rows = end - row < ROWS ? end - row : ROWS;
        for (int64_t r = 0; r < rows; r++) {
            float *out = decoded + r * count;
            const auto use = [&](int64_t at, int, __m512 weights) {
                _mm512_store_ps(out + (at - first * UNIT), weights);
            };
            row_scales(w, row + r, first / span, (last - 1) / span + 1, pos, neg);
            decode<BITS>(w, book, w.codes + (row + r) * w.row_bytes, pos, neg, first, last, use);
        }
        if (rows == ROWS)
            tiles<ROWS>(decoded, x + first * UNIT, in.stride, tokens, count, y + row, w.rows);
        else
            for (int64_t r = 0; r < rows; r++)
                tiles<1>(decoded + r * count, x + first * UNIT, in.stride, tokens, count, y + row + r, w.rows);
    }
}

template <int BITS> void exact_many(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    const Scratch scales(2 * w.groups), decoded(ROWS * PANEL * UNIT);
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    for (int64_t t = 0; t < in.tokens; t++) memset(y + t * w.rows + begin, 0, static_cast<size_t>(4 * (end - begin)));
    for (int64_t t = 0; t < in.tokens; t += BLOCK) {
        const int64_t tokens = in.tokens - t < BLOCK ? in.tokens - t : BLOCK;
        for (int64_t first = 0; first < units; first += PANEL) {
            const int64_t last = first + PANEL < units ? first + PANEL : units;
            exact_panel<BITS>(w, book, in, begin, end, first, last, in.x + t * in.stride, tokens, scales.data,
                              scales.data + w.groups, decoded.data, y + t * w.rows);
        }
    }
}

// ---- int8 arithmetic: inputs of 8 bits times weights of 8 bits and an offset. A vector of 64 codes is 16 codes of
// each of the four units of a CHUNK, one in each 128-bit lane, with a table of its own there.

constexpr int OFFSET = 128; // weights are -127..127, stored 1..255

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

void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits) {
    for (int64_t first = 0; first < count; first += CHUNK)
        for (int v = 0; v < 2; v++)
            for (int unit = 0; unit < 4; unit++)
                for (int e = 0; e < 16; e++)
                    out[first + 64 * v + 16 * unit + e] =
                        in[first + UNIT * unit + (bits == 4 ? 2 * e + v : 16 * v + e)];
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
void int8_tokens(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    float largest = 1e-6f;
    for (int i = 0; i < 1 << BITS; i++) largest = std::fmax(largest, std::fabs(w.book[i]));
    const int64_t padded = (w.groups + 15) / 16 * 16;
    const Scratch scratch((3 + T) * padded);
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
}

// ---- weights in natural order

template <int BITS> constexpr Spread LOWER(BITS, 0);
template <int BITS> constexpr Spread UPPER(BITS, 16 * BITS);

template <int BITS> void dequantize_bits(const Weight &w, int64_t begin, int64_t end, float *out) {
    const Book book(w);
    const Scratch scales(2 * w.groups);
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
}

void dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    if (w.bits == 4) dequantize_bits<4>(w, begin, end, out);
    if (w.bits == 3) dequantize_bits<3>(w, begin, end, out);
    if (w.bits == 2) dequantize_bits<2>(w, begin, end, out);
}

// ---- by bits and tokens

template <int BITS> void exact_bits(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (in.tokens == 1)
        exact_one<BITS>(w, in, begin, end, y);
    else
        exact_many<BITS>(w, in, begin, end, y);
}

void exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (w.bits == 4) exact_bits<4>(w, in, begin, end, y);
    if (w.bits == 3) exact_bits<3>(w, in, begin, end, y);
    if (w.bits == 2) exact_bits<2>(w, in, begin, end, y);
}

template <int BITS> void int8_bits(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (in.tokens == 1) int8_tokens<BITS, 1>(w, in, begin, end, y);
    if (in.tokens == 2) int8_tokens<BITS, 2>(w, in, begin, end, y);
    if (in.tokens == 3) int8_tokens<BITS, 3>(w, in, begin, end, y);
    if (in.tokens == 4) int8_tokens<BITS, 4>(w, in, begin, end, y);
    if (in.tokens == 5) int8_tokens<BITS, 5>(w, in, begin, end, y);
    if (in.tokens == 6) int8_tokens<BITS, 6>(w, in, begin, end, y);
}

void int8(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (w.bits == 4) int8_bits<4>(w, in, begin, end, y);
    if (w.bits == 3) int8_bits<3>(w, in, begin, end, y);
    if (w.bits == 2) int8_bits<2>(w, in, begin, end, y);
}

const Kernels TABLE = {"avx512", 6,       permute_exact, permute_int8, exact,     int8,
                       nullptr,  nullptr, dequantize,    to_float,     from_float};

} // namespace

const Kernels *avx512_kernels() { return &TABLE; }

} // namespace afpq

#else

namespace afpq {
const Kernels *avx512_kernels() { return nullptr; }
} // namespace afpq

#endif
