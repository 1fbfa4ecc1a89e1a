// SPDX-License-Identifier: MIT
// AVX2, exact arithmetic: float32 throughout.
#include "../afpq.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2_decode.h"

namespace afpq {
namespace {

template <int BITS> Error exact_one(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Decoder<BITS> decoder(w);
    Zeros zeros(w);
    const Scratch<float> scales(2 * w.groups);
    if (!zeros || !scales) return NO_MEMORY;
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, zeros, row, pos, neg);
        __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        const auto use = [&](int64_t at, int i, __m256 weights) {
            acc[i] = _mm256_fmadd_ps(weights, _mm256_load_ps(in.x + at), acc[i]);
        };
        const uint8_t *codes = w.codes + row * w.row_bytes;
        if (far_from_end<BITS>(w, codes, units))
            decoder.run(w, codes, Anywhere(), pos, neg, 0, units, use);
        else
            decoder.run(w, codes, w.end, pos, neg, 0, units, use);
        y[row] = sum(_mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
    }
    return DONE;
}

// y[token, row] += dot products of R decoded rows with T tokens over `count` inputs.
template <int R, int T>
inline void tile(const float *weights, int64_t weight_stride, const float *x, int64_t stride, int64_t count, float *y,
                 int64_t y_stride) {
    __m256 acc[R][T];
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) acc[r][t] = _mm256_setzero_ps();
    for (int64_t k = 0; k < count; k += 8) {
        __m256 v[T];
        for (int t = 0; t < T; t++) v[t] = _mm256_load_ps(x + t * stride + k);
        for (int r = 0; r < R; r++) {
            const __m256 u = _mm256_load_ps(weights + r * weight_stride + k);
            for (int t = 0; t < T; t++) acc[r][t] = _mm256_fmadd_ps(u, v[t], acc[r][t]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) y[t * y_stride + r] += sum(acc[r][t]);
}

constexpr int64_t ROWS = 4;                 // decoded side by side
constexpr int64_t PANEL_BYTES = 192 * 1024; // inputs that stay in the second-level cache while all rows pass

template <int R>
void tiles(const float *weights, int64_t weight_stride, const Inputs &in, int64_t first, int64_t count, float *y,
           int64_t rows) {
    int64_t t = 0;
    for (; t + 3 <= in.tokens; t += 3)
        tile<R, 3>(weights, weight_stride, in.x + t * in.stride + first, in.stride, count, y + t * rows, rows);
    if (in.tokens - t == 2)
        tile<R, 2>(weights, weight_stride, in.x + t * in.stride + first, in.stride, count, y + t * rows, rows);
    else if (in.tokens - t == 1)
        tile<R, 1>(weights, weight_stride, in.x + t * in.stride + first, in.stride, count, y + t * rows, rows);
}

template <int BITS> Error exact_many(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Decoder<BITS> decoder(w);
    Zeros zeros(w);
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    int64_t panel = PANEL_BYTES / (4 * CHUNK * in.tokens) * (CHUNK / UNIT); // units
    panel = panel < 8 ? 8 : panel > 128 ? 128 : panel;
    const Scratch<float> scales(2 * w.groups), decoded(ROWS * (panel + 1) * UNIT);
    if (!zeros || !scales || !decoded) return NO_MEMORY;
    float *pos = scales.data, *neg = scales.data + w.groups;
    for (int64_t t = 0; t < in.tokens; t++) memset(y + t * w.rows + begin, 0, static_cast<size_t>(4 * (end - begin)));
    for (int64_t first = 0; first < units; first += panel) {
        const int64_t last = first + panel < units ? first + panel : units;
        // Whole pairs: inputs are zero behind the end.
        const int64_t at = first * UNIT, count = (last - first + 1) / 2 * 2 * UNIT;
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t rows = end - row < ROWS ? end - row : ROWS;
            for (int64_t r = 0; r < rows; r++) {
                row_scales(w, zeros, row + r, pos, neg);
                float *out = decoded.data + r * count - at;
                if ((last - first) % 2) memset(out + last * UNIT, 0, 4 * UNIT);
                const auto use = [&](int64_t place, int, __m256 weights) { _mm256_store_ps(out + place, weights); };
                const uint8_t *codes = w.codes + (row + r) * w.row_bytes;
                if (far_from_end<BITS>(w, codes, last))
                    decoder.run(w, codes, Anywhere(), pos, neg, first, last, use);
                else
                    decoder.run(w, codes, w.end, pos, neg, first, last, use);
            }
            if (rows == ROWS)
                tiles<ROWS>(decoded.data, count, in, at, count, y + row, w.rows);
            else
                for (int64_t r = 0; r < rows; r++)
                    tiles<1>(decoded.data + r * count, count, in, at, count, y + row + r, w.rows);
        }
    }
    return DONE;
}

} // namespace

namespace avx2 {

void permute_exact(const float *in, float *out, int64_t count, int32_t bits) {
    // See `weave`: vector v of a pair holds, for both units, every other code from 8 (v % 4) + v / 4 on.
    if (bits == 4) {
        for (int64_t first = 0; first < count; first += 2 * UNIT)
            for (int64_t v = 0; v < 8; v++)
                for (int64_t e = 0; e < 8; e++)
                    out[first + 8 * v + e] = in[first + UNIT * (e / 4) + 2 * (4 * (v % 4) + e % 4) + v / 4];
        return;
    }
    for (int64_t first = 0; first < count; first += UNIT)
        for (int64_t j = 0; j < 4; j++)
            for (int64_t lane = 0; lane < 8; lane++) out[first + 8 * j + lane] = in[first + 4 * lane + j];
}

Error exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    return by_bits(w.bits, [&](auto bits) {
        return in.tokens == 1 ? exact_one<bits>(w, in, begin, end, y) : exact_many<bits>(w, in, begin, end, y);
    });
}

} // namespace avx2
} // namespace afpq

#endif
