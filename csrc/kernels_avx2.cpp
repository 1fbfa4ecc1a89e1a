// SPDX-License-Identifier: MIT
// AVX2 + FMA + F16C kernels. Everything is in an anonymous namespace: nothing compiled with these flags may be merged
// by the linker with code that runs elsewhere.
#include "afpq.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace afpq {
namespace {

// ---- memory

struct Scratch { // aligned, freed with its scope
    explicit Scratch(int64_t count) : data(static_cast<float *>(aligned_alloc(64, (4 * count + 127) / 64 * 64))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    float *data;
};

template <int BITS> constexpr int64_t UNIT_BYTES = 4 * BITS;

// 16 bytes that begin with a unit; with an `end`, near it, only what is there is read.
struct Anywhere {}; // in place of `end`: there is enough behind
inline __m128i load_unit(const uint8_t *unit, Anywhere) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(unit));
}
inline __m128i load_unit(const uint8_t *unit, const uint8_t *end) {
    if (unit + 16 <= end) return load_unit(unit, Anywhere());
    alignas(16) uint8_t copy[16] = {};
    if (unit < end) memcpy(copy, unit, static_cast<size_t>(end - unit));
    return _mm_load_si128(reinterpret_cast<const __m128i *>(copy));
}

// Whether reading all of a row's units, rounded up to CHUNKs, stays inside the weight.
template <int BITS> inline bool far_from_end(const Weight &w, const uint8_t *codes, int64_t units) {
    return w.end - codes >= (units + CHUNK / UNIT) * UNIT_BYTES<BITS> + 16;
}

// ---- decoding, exact: a unit -> 8 lanes whose low bits are codes 4 * lane; `BITS` further up is the next code

template <int BITS> inline __m256i lanes(__m128i unit);

template <> inline __m256i lanes<4>(__m128i unit) { return _mm256_cvtepu16_epi32(unit); }

template <> inline __m256i lanes<2>(__m128i unit) { return _mm256_cvtepu8_epi32(unit); }

template <> inline __m256i lanes<3>(__m128i unit) { // lane l is bits 12 l .. 12 l + 11: from byte 3 l / 2, shifted by 4 where l is odd
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

// ---- scales of one row, float32

int32_t zero_at(const Weight &w, int64_t row, int64_t group) {
    const uint8_t *packed = w.zeros + group * w.zero_bytes;
    const int64_t bit = row * w.bits, byte = bit / 8;
    const uint32_t two = packed[byte] | (byte + 1 < w.zero_bytes ? packed[byte + 1] << 8 : 0);
    return static_cast<int32_t>(two >> (bit % 8) & ((1u << w.bits) - 1));
}

void convert(const void *in, Kind kind, int64_t first, int64_t count, float *out) {
    if (kind == FLOAT32) {
        memcpy(out, static_cast<const float *>(in) + first, static_cast<size_t>(4 * count));
        return;
    }
    const uint16_t *from = static_cast<const uint16_t *>(in) + first;
    int64_t i = 0;
    if (kind == FLOAT16) {
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
        for (; i < count; i++) out[i] = _cvtsh_ss(from[i]);
    } else {
        for (; i < count; i++) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            memcpy(out + i, &bits, 4);
        }
    }
}

// pos and neg of a row's groups; with zeros, neg becomes zero * scale (exact: 11 bits times 4).
void row_scales(const Weight &w, int64_t row, float *pos, float *neg) {
    convert(w.pos, w.scale_kind, row * w.groups, w.groups, pos);
    if (w.zeros)
        for (int64_t g = 0; g < w.groups; g++) neg[g] = static_cast<float>(zero_at(w, row, g)) * pos[g];
    else if (w.neg != w.pos)
        convert(w.neg, w.scale_kind, row * w.groups, w.groups, neg);
    else
        memcpy(neg, pos, static_cast<size_t>(4 * w.groups));
}

inline float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

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

// Two units; in each vector the low half is of the first and the high half of the second.
inline __m256i load_pair(const uint8_t *pair, Anywhere) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(pair));
}
inline __m256i load_pair(const uint8_t *pair, const uint8_t *end) {
    return _mm256_set_m128i(load_unit(pair + 16, end), load_unit(pair, end));
}

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

void permute_exact(const float *in, float *out, int64_t count, int32_t bits) {
    if (bits == 4) { // see `weave`: vector v of a pair holds, for both units, every other code from 8 (v % 4) + v / 4 on
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

template <int BITS> void exact_one(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Decoder<BITS> decoder(w);
    const Scratch scales(2 * w.groups);
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, row, pos, neg);
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
    const int64_t units = (w.columns + UNIT - 1) / UNIT;
    int64_t panel = PANEL_BYTES / (4 * CHUNK * in.tokens) * (CHUNK / UNIT); // units
    panel = panel < 8 ? 8 : panel > 128 ? 128 : panel;
    const Scratch scales(2 * w.groups), decoded(ROWS * (panel + 1) * UNIT);
    float *pos = scales.data, *neg = scales.data + w.groups;
    for (int64_t t = 0; t < in.tokens; t++) memset(y + t * w.rows + begin, 0, static_cast<size_t>(4 * (end - begin)));
    for (int64_t first = 0; first < units; first += panel) {
        const int64_t last = first + panel < units ? first + panel : units;
        const int64_t at = first * UNIT, count = (last - first + 1) / 2 * 2 * UNIT; // whole pairs: x is zero behind the end
        for (int64_t row = begin; row < end; row += ROWS) {
            const int64_t rows = end - row < ROWS ? end - row : ROWS;
            for (int64_t r = 0; r < rows; r++) {
                row_scales(w, row + r, pos, neg);
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

// ---- int8 arithmetic: inputs of 8 bits times weights of 7 bits and an offset

constexpr int OFFSET = 64; // weights are -63..63, stored 1..127: two products with inputs of 127 still fit 16 bits

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

void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits) {
    if (bits == 4) permute_bits<4>(in, out, count);
    if (bits == 3) permute_bits<3>(in, out, count);
    if (bits == 2) permute_bits<2>(in, out, count);
}

// The code book as words, and how a group's scales turn it into a table of bytes: book * (ratio of its side to the
// larger one), or, with zero points, 4 * (code - zero), which is exact.
struct WordBook {
    __m256i book, side;
    float step; // of a weight, in units of the larger scale
    bool zeros;

    static constexpr int BOOK = 4095, RATIO = 504; // BOOK * RATIO / 2^15 = 63

    explicit WordBook(const Weight &w) : zeros(w.zeros != nullptr) {
        float largest = 0;
        for (int i = 0; i < 1 << w.bits; i++) largest = std::fmax(largest, std::fabs(w.book[i]));
        step = zeros ? 0.25f : largest / 63;
        alignas(32) int16_t values[16];
        alignas(32) uint8_t sides[32];
        for (int i = 0; i < 16; i++) {
            const int code = i & ((1 << w.bits) - 1);
            const float value = w.book[code];
            values[i] = static_cast<int16_t>(zeros ? 4 * code : std::lrint(value / largest * BOOK));
            sides[2 * i] = value < 0 && !zeros ? 2 : 0; // which half of the pair (pos, neg)
            sides[2 * i + 1] = sides[2 * i] + 1;
        }
        book = _mm256_load_si256(reinterpret_cast<const __m256i *>(values));
        side = _mm256_load_si256(reinterpret_cast<const __m256i *>(sides));
    }
    template <bool ZEROS> inline __m256i scaled(int32_t pair) const {
        const __m256i s = _mm256_shuffle_epi8(_mm256_set1_epi32(pair), side);
        const __m256i words = ZEROS ? _mm256_sub_epi16(book, s) : _mm256_mulhrs_epi16(book, s);
        const __m256i shifted = _mm256_add_epi16(words, _mm256_set1_epi16(OFFSET));
        return _mm256_permute4x64_epi64(_mm256_packus_epi16(shifted, shifted), 0x88);
    }
};

// For a row's groups: what one integer step of a weight stands for, and the pair of words `scaled` takes.
void word_scales(const Weight &w, const WordBook &book, int64_t row, float *unit, int32_t *pair, float *neg) {
    convert(w.pos, w.scale_kind, row * w.groups, w.groups, unit);
    if (book.zeros) {
        for (int64_t g = 0; g < w.groups; g++) pair[g] = zero_at(w, row, g) * 4;
        for (int64_t g = 0; g < w.groups; g++) unit[g] *= book.step;
        return;
    }
    if (w.neg == w.pos) {
        for (int64_t g = 0; g < w.groups; g++) pair[g] = WordBook::RATIO | WordBook::RATIO << 16;
        for (int64_t g = 0; g < w.groups; g++) unit[g] *= book.step;
        return;
    }
    convert(w.neg, w.scale_kind, row * w.groups, w.groups, neg);
    const __m256 tiny = _mm256_set1_ps(1e-30f), ratio = _mm256_set1_ps(WordBook::RATIO), step = _mm256_set1_ps(book.step);
    for (int64_t g = 0; g < w.groups; g += 8) { // the arrays are padded to whole vectors
        const __m256 p = _mm256_load_ps(unit + g), n = _mm256_load_ps(neg + g);
        const __m256 larger = _mm256_max_ps(_mm256_max_ps(p, n), tiny), inverse = _mm256_div_ps(ratio, larger);
        const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(p, inverse));
        const __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(n, inverse)), 16);
        _mm256_store_si256(reinterpret_cast<__m256i *>(pair + g), _mm256_or_si256(low, high));
        _mm256_store_ps(unit + g, _mm256_mul_ps(larger, step));
    }
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
    int32_t *pair;
};

// One row whose groups are whole CHUNKs (or one for the row). Behind the last column inputs are zero, so that the codes
// there do not matter.
template <int BITS, int T, bool ZEROS, class End>
inline void int8_row(const Weight &w, const WordBook &book, const Inputs &in, const uint8_t *codes, End end,
                     Int8Scales s, __m256 *acc) {
    constexpr int64_t PAIRS = CHUNK / (2 * UNIT), BYTES = 2 * UNIT_BYTES<BITS>;
    const int64_t chunks = in.stride / CHUNK, span = w.groups == 1 ? chunks : w.group / CHUNK;
    const int8_t *q = in.q;
    for (int64_t c = 0, g = 0; c < chunks; g++) {
        const __m256i table = book.scaled<ZEROS>(s.pair[g]);
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
template <int BITS, int T, bool ZEROS, class End>
inline void int8_short_row(const Weight &w, const WordBook &book, const Inputs &in, const uint8_t *codes, End end,
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
        __m256i table = book.scaled<ZEROS>(s.pair[a]), sums[T];
        if (a != b) table = _mm256_blend_epi32(table, book.scaled<ZEROS>(s.pair[b]), 0xf0);
        for (int t = 0; t < T; t++) sums[t] = _mm256_setzero_si256();
        dot<T>(codes_of<BITS>(codes + p * BYTES, end), table, in.q + p * 2 * UNIT, in.stride, sums);
        const __m256 unit = _mm256_set_m128(_mm_broadcast_ss(s.unit + b), _mm_broadcast_ss(s.unit + a));
        for (int t = 0; t < T; t++) {
            const __m256 scale = _mm256_mul_ps(unit, _mm256_broadcast_ss(in.steps + t * chunks + p / PAIRS));
            acc[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), scale, acc[t]);
        }
    }
}

template <int BITS, int T, bool ZEROS>
inline void int8_any_row(const Weight &w, const WordBook &book, const Inputs &in, const uint8_t *codes, Int8Scales s,
                         __m256 *acc) {
    const bool whole = w.groups == 1 || w.group % CHUNK == 0, far = far_from_end<BITS>(w, codes, in.stride / UNIT);
    if (whole && far) return int8_row<BITS, T, ZEROS>(w, book, in, codes, Anywhere(), s, acc);
    if (whole) return int8_row<BITS, T, ZEROS>(w, book, in, codes, w.end, s, acc);
    if (far) return int8_short_row<BITS, T, ZEROS>(w, book, in, codes, Anywhere(), s, acc);
    int8_short_row<BITS, T, ZEROS>(w, book, in, codes, w.end, s, acc);
}

template <int BITS, int T>
void int8_tokens(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const WordBook book(w);
    const int64_t padded = (w.groups + 7) / 8 * 8;
    const Scratch scratch((3 + T) * padded);
    const Int8Scales s = {scratch.data, scratch.data + padded, reinterpret_cast<int32_t *>(scratch.data + 2 * padded)};
    float *input_sums = scratch.data + 3 * padded;
    memset(scratch.data, 0, static_cast<size_t>(4 * (3 + T) * padded));
    for (int t = 0; t < T; t++)
        memcpy(input_sums + t * padded, in.sums + t * w.groups, static_cast<size_t>(4 * w.groups));
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *codes = w.codes + row * w.row_bytes;
        word_scales(w, book, row, s.unit, s.pair, s.neg);
        __m256 acc[T];
        for (int t = 0; t < T; t++) acc[t] = _mm256_setzero_ps();
        if (book.zeros)
            int8_any_row<BITS, T, true>(w, book, in, codes, s, acc);
        else
            int8_any_row<BITS, T, false>(w, book, in, codes, s, acc);
        for (int t = 0; t < T; t++) { // take off what storing the weights unsigned added
            __m256 offset = _mm256_setzero_ps();
            for (int64_t g = 0; g < padded; g += 8)
                offset = _mm256_fmadd_ps(_mm256_load_ps(s.unit + g), _mm256_load_ps(input_sums + t * padded + g), offset);
            y[t * w.rows + row] = sum(_mm256_fnmadd_ps(offset, _mm256_set1_ps(OFFSET), acc[t]));
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
    const Scratch scales(2 * w.groups);
    float *pos = scales.data, *neg = scales.data + w.groups;
    const int64_t units = (w.columns + UNIT - 1) / UNIT, span = w.groups == 1 ? units : w.group / UNIT;
    for (int64_t row = begin; row < end; row++) {
        row_scales(w, row, pos, neg);
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

void to_float(const void *in, Kind kind, float *out, int64_t count) { convert(in, kind, 0, count, out); }

void from_float(const float *in, void *out, Kind kind, int64_t count) {
    if (kind == FLOAT32) {
        memcpy(out, in, static_cast<size_t>(4 * count));
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(out);
    for (int64_t i = 0; i < count; i++) {
        if (kind == FLOAT16) {
            to[i] = static_cast<uint16_t>(_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT));
        } else {
            uint32_t bits;
            memcpy(&bits, in + i, 4);
            const bool nan = (bits & 0x7fffffff) > 0x7f800000; // rounding up could turn it into infinity
            to[i] = static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
}

const Kernels TABLE = {"avx2", 6, permute_exact, permute_int8, exact, int8, nullptr, nullptr, dequantize, to_float, from_float};

} // namespace

const Kernels *avx2_kernels() { return &TABLE; }

} // namespace afpq

#else

namespace afpq {
const Kernels *avx2_kernels() { return nullptr; }
} // namespace afpq

#endif
