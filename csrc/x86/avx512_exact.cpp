// SPDX-License-Identifier: MIT
// AVX-512, exact arithmetic: float32 throughout.
#include "avx512.h"

#ifdef AFPQ_AVX512

namespace afpq {
namespace {

// ---- decoding: two units -> 16 lanes whose low bits are codes 4 * lane; `BITS` further up is the next code. The first
// unit is in the lower 8 lanes, the second in the upper ones.

constexpr Spread<uint32_t> TWELVE(12, 0); // codes of 3 bits

template <int BITS> inline __m512i lanes(__m256i pair) {
    if constexpr (BITS == 4) return _mm512_cvtepu16_epi32(pair);
    if constexpr (BITS == 3) return TWELVE(pair);
    return _mm512_cvtepu8_epi32(_mm256_castsi256_si128(pair));
}

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

// ---- products

template <int BITS> Error exact_one(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    const Scratch<float> scales(2 * w.groups);
    if (!scales) return NO_MEMORY;
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
    return DONE;
}

constexpr int ROWS = 4;        // decoded side by side
constexpr int TOKENS = 6;      // times ROWS sums, TOKENS inputs and a weight: 31 of 32 registers
constexpr int64_t PANEL = 32;  // units: 4 rows of 1024 weights take half of the first-level cache,
constexpr int64_t BLOCK = 96;  // tokens: and their inputs less than half of the second-level one, while all rows pass

inline __m256 halves(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

// y[token, row] += dot products of R decoded rows with T tokens over `count` inputs.
template <int R, int T>
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

template <int R>
void tiles(const float *weights, const float *x, int64_t stride, int64_t tokens, int64_t count, float *y,
           int64_t rows) {
    for (; tokens >= TOKENS; tokens -= TOKENS, x += TOKENS * stride, y += TOKENS * rows)
        tile<R, TOKENS>(weights, x, stride, count, y, rows);
    if (tokens > 0)
        by_count<TOKENS - 1>(tokens, [&](auto count_of) { tile<R, count_of>(weights, x, stride, count, y, rows); });
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
            const int64_t group = first / span;
            row_scales(w, row + r, group, (last - 1) / span + 1, pos + group, neg + group);
            decode<BITS>(w, book, w.codes + (row + r) * w.row_bytes, pos, neg, first, last, use);
        }
        if (rows == ROWS)
            tiles<ROWS>(decoded, x + first * UNIT, in.stride, tokens, count, y + row, w.rows);
        else
            for (int64_t r = 0; r < rows; r++)
                tiles<1>(decoded + r * count, x + first * UNIT, in.stride, tokens, count, y + row + r, w.rows);
    }
}

template <int BITS> Error exact_many(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    const Scratch<float> scales(2 * w.groups), decoded(ROWS * PANEL * UNIT);
    if (!scales || !decoded) return NO_MEMORY;
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
    return DONE;
}

} // namespace

namespace avx512 {

void permute_exact(const float *in, float *out, int64_t count, int32_t) {
    for (int64_t first = 0; first < count; first += 2 * UNIT)
        for (int64_t j = 0; j < 4; j++)
            for (int64_t lane = 0; lane < 16; lane++) out[first + 16 * j + lane] = in[first + 4 * lane + j];
}

Error exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    return by_bits(w.bits, [&](auto bits) {
        return in.tokens == 1 ? exact_one<bits>(w, in, begin, end, y) : exact_many<bits>(w, in, begin, end, y);
    });
}

} // namespace avx512
} // namespace afpq

#endif
