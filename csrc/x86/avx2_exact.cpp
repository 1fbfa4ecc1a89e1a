// SPDX-License-Identifier: MIT
// AVX2, exact arithmetic: float32 throughout. Also the table of what AVX2 offers.
#include "../afpq.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"

namespace afpq {
namespace {

// ---- decoding, exact: a unit -> 8 lanes whose low bits are codes 4 * lane; `BITS` further up is the next code

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

// ---- exact arithmetic

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

template <int BITS> void exact_one(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Decoder<BITS> decoder(w);
    Zeros zeros(w);
    const Scratch scales(2 * w.groups);
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

template <int BITS> void exact_many(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Decoder<BITS> decoder(w);
    Zeros zeros(w);
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    int64_t panel = PANEL_BYTES / (4 * CHUNK * in.tokens) * (CHUNK / UNIT); // units
    panel = panel < 8 ? 8 : panel > 128 ? 128 : panel;
    const Scratch scales(2 * w.groups), decoded(ROWS * (panel + 1) * UNIT);
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
}

// ---- weights in natural order

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

template <int BITS> void dequantize_bits(const Weight &w, int64_t begin, int64_t end, float *out) {
    const Book<BITS> book(w);
    Zeros zeros(w);
    const Scratch scales(2 * w.groups);
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
}

void dequantize(const Weight &w, int64_t begin, int64_t end, float *out) {
    if (w.bits == 4) dequantize_bits<4>(w, begin, end, out);
    if (w.bits == 3) dequantize_bits<3>(w, begin, end, out);
    if (w.bits == 2) dequantize_bits<2>(w, begin, end, out);
}

template <int BITS> void exact_bits(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (in.tokens == 1)
        exact_one<BITS>(w, in, begin, end, y);
    else
        exact_many<BITS>(w, in, begin, end, y);
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

void exact(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    if (w.bits == 4) exact_bits<4>(w, in, begin, end, y);
    if (w.bits == 3) exact_bits<3>(w, in, begin, end, y);
    if (w.bits == 2) exact_bits<2>(w, in, begin, end, y);
}

} // namespace avx2

const Kernels *avx2_kernels() {
    static const Kernels table = {"avx2",  6,       avx2::permute_exact, avx2::permute_int8, avx2::exact, avx2::int8,
                                  nullptr, nullptr, dequantize,          to_float,           from_float};
    return &table;
}

} // namespace afpq

#else

namespace afpq {
const Kernels *avx2_kernels() { return nullptr; }
} // namespace afpq

#endif
