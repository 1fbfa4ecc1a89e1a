// SPDX-License-Identifier: MIT
// AMX kernels: products of bfloat16 in tiles (Sapphire Rapids and later); everything else is AVX-512's. In an anonymous
// namespace: nothing compiled with these flags may be merged by the linker with code that runs elsewhere.
//
// A tile is 16 rows of 64 bytes. C[weight row, token] += A[weight row, input] * B[input pair, token], so that a unit of
// codes, looked up as words, is one row of an A tile as it is; only the inputs have to be transposed, once per call,
// and the sums at the end. Scales are in the table of each group: C is summed over all inputs without rescaling.
// Products take subnormal numbers as zero, and give zero for them.
#include "avx512.h"

#if defined(AFPQ_EMULATE) || (defined(AFPQ_AVX512) && defined(__AMX_TILE__) && defined(__AMX_BF16__) &&                \
                              defined(__AVX512BF16__))

namespace afpq {
namespace {

// ---- tiles

constexpr int64_t SIDE = 16;              // rows of a tile, and its columns of 32 bits
constexpr int64_t TILE = SIDE * 2 * SIDE; // words of a tile

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};
constexpr TileConfig TILES{};

// The compiler does not know that tile loads read memory, nor that stores to it must come first.
inline void settle() { __asm__ volatile("" ::: "memory"); }

// C[A * 16 rows, B * 16 tokens] (+)= a * b over `count` units. Tiles 0-3 are C, 4 and 5 of a, 6 and 7 of b.
template <int A, int B>
void multiply(const uint16_t *a, const uint16_t *b, int64_t next_b, int64_t count, float *c, int64_t width,
              bool fresh) {
    const int64_t bytes = 4 * width;
    settle();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, bytes);
        if (B == 2) _tile_loadd(1, c + SIDE, bytes);
        if (A == 2) _tile_loadd(2, c + SIDE * width, bytes);
        if (A == 2 && B == 2) _tile_loadd(3, c + SIDE * width + SIDE, bytes);
    }
    for (int64_t i = 0; i < count; i++, a += 2 * TILE, b += TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (A == 2) {
            _tile_loadd(5, a + TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (B == 2) {
            _tile_loadd(7, b + next_b, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (A == 2 && B == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, bytes);
    if (B == 2) _tile_stored(1, c + SIDE, bytes);
    if (A == 2) _tile_stored(2, c + SIDE * width, bytes);
    if (A == 2 && B == 2) _tile_stored(3, c + SIDE * width + SIDE, bytes);
    settle();
}

// 16 x 16 of 32 bits: exchanges the off-diagonal quarters of blocks of 2, 4, 8 and 16.
inline void transpose(__m512i *v) {
    for (uint32_t s = 1; s < 16; s *= 2) {
        alignas(64) uint32_t low[16], high[16]; // where lanes come from; 16 and up: from the second vector
        for (uint32_t i = 0; i < 16; i++) {
            low[i] = i & s ? 16 + i - s : i;
            high[i] = i & s ? 16 + i : i + s;
        }
        const __m512i from = _mm512_load_si512(low), to = _mm512_load_si512(high);
        for (uint32_t i = 0; i < 16; i++) {
            if (i & s) continue;
            const __m512i a = v[i], b = v[i + s];
            v[i] = _mm512_permutex2var_epi32(a, from, b);
            v[i + s] = _mm512_permutex2var_epi32(a, to, b);
        }
    }
}

// Tiles [tokens / 16, stride / 32], each [pair of inputs, token, 2].
void pack_bf16(const uint16_t *in, uint16_t *out, int64_t tokens, int64_t stride) {
    for (int64_t t = 0; t < tokens; t += SIDE)
        for (int64_t k = 0; k < stride; k += UNIT, out += TILE) {
            __m512i v[SIDE];
            for (int64_t i = 0; i < SIDE; i++)
                v[i] = t + i < tokens ? _mm512_loadu_si512(in + (t + i) * stride + k) : _mm512_setzero_si512();
            transpose(v);
            for (int64_t i = 0; i < SIDE; i++) _mm512_storeu_si512(out + i * UNIT, v[i]);
        }
}

// ---- weights

// Word i of a unit in natural order begins with the bits of code i.
template <int BITS> constexpr Spread<uint16_t> WORDS(BITS, 0);

// The values of a group's codes as bfloat16, repeated to 32: `vpermw` reads five bits of each index, and ignores the
// others.
inline __m512i bf16_table(const Book &book, float pos, float neg) {
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(book.scaled(pos, neg)));
}

constexpr int64_t PANEL = 16;   // units: decoded, two tiles of rows take two thirds of the first-level cache
constexpr int64_t TOKENS = 512; // their inputs for a panel a quarter of the second-level one,
constexpr int64_t ROWS = 256;   // and the sums of these rows another

// Up to 32 rows, units [first, last) -> tiles [unit, row / 16]. Rows that are not there are left as they are: nothing
// reads the sums they make.
template <int BITS>
void decode(const Weight &w, const Book &book, int64_t row, int64_t rows, int64_t first, int64_t last, uint16_t *out) {
    const int64_t span = w.groups == 1 ? last : w.group / UNIT, first_group = first / span;
    for (int64_t r = 0; r < rows; r++) {
        float pos[PANEL], neg[PANEL];
        row_scales(w, row + r, first_group, (last - 1) / span + 1, pos, neg);
        const uint8_t *codes = w.codes + (row + r) * w.row_bytes;
        uint16_t *to = out + r / SIDE * TILE + r % SIDE * UNIT;
        for (int64_t unit = first; unit < last;) {
            const int64_t g = unit / span, stop = (g + 1) * span < last ? (g + 1) * span : last;
            const __m512i table = bf16_table(book, pos[g - first_group], neg[g - first_group]);
            for (; unit < stop; unit++, to += 2 * TILE) {
                const __m512i words = WORDS<BITS>(load_pair(codes + unit * UNIT_BYTES<BITS>, w.end));
                _mm512_store_si512(to, _mm512_permutexvar_epi16(words, table));
            }
        }
    }
}

// ---- products

struct Part { // of the result
    int64_t row, rows, token, tokens;
};

template <int BITS>
void sum_part(const Weight &w, const Book &book, const Inputs &in, Part p, uint16_t *a, float *c, int64_t width) {
    const int64_t units = (w.columns + UNIT - 1) / UNIT, next_b = in.stride / UNIT * TILE; // to the next 16 tokens
    for (int64_t first = 0; first < units; first += PANEL) {
        const int64_t last = first + PANEL < units ? first + PANEL : units;
        for (int64_t r = 0; r < p.rows; r += 2 * SIDE) {
            const int64_t rows = p.rows - r < 2 * SIDE ? p.rows - r : 2 * SIDE;
            decode<BITS>(w, book, p.row + r, rows, first, last, a);
            for (int64_t t = 0; t < p.tokens; t += 2 * SIDE) {
                const uint16_t *b = in.half + (p.token + t) / SIDE * next_b + first * TILE;
                const bool two = p.tokens - t > SIDE;
                const auto run = rows > SIDE ? two ? multiply<2, 2> : multiply<2, 1>
                                             : two ? multiply<1, 2> : multiply<1, 1>;
                run(a, b, next_b, last - first, c + r * width + t, width, first == 0);
            }
        }
    }
}

void store_part(const Weight &w, Part p, const float *c, int64_t width, float *y) {
    for (int64_t r = 0; r < p.rows; r += SIDE)
        for (int64_t t = 0; t < p.tokens; t += SIDE) {
            __m512i v[SIDE];
            for (int64_t i = 0; i < SIDE; i++) v[i] = _mm512_loadu_si512(c + (r + i) * width + t);
            transpose(v);
            const int64_t left = p.rows - r;
            const __mmask16 mask = static_cast<__mmask16>(left < SIDE ? (1 << left) - 1 : 0xffff);
            for (int64_t i = 0; i < SIDE && t + i < p.tokens; i++)
                _mm512_mask_storeu_epi32(y + (p.token + t + i) * w.rows + p.row + r, mask, v[i]);
        }
}

template <int BITS> Error bf16_bits(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    const Book book(w);
    const int64_t most_rows = end - begin < ROWS ? (end - begin + SIDE - 1) / SIDE * SIDE : ROWS;
    const int64_t most_tokens = in.tokens < TOKENS ? (in.tokens + SIDE - 1) / SIDE * SIDE : TOKENS;
    const int64_t width = most_tokens + SIDE; // not a power of two: rows would share few places in the cache
    const Scratch<uint16_t> weights(2 * PANEL * TILE);
    const Scratch<float> sums(most_rows * width);
    if (!weights || !sums) return NO_MEMORY;
    for (int64_t token = 0; token < in.tokens; token += TOKENS)
        for (int64_t row = begin; row < end; row += ROWS) {
            const Part p = {row, end - row < ROWS ? end - row : ROWS, token,
                            in.tokens - token < TOKENS ? in.tokens - token : TOKENS};
            sum_part<BITS>(w, book, in, p, weights.data, sums.data, width);
            store_part(w, p, sums.data, width, y);
        }
    return DONE;
}

Error bf16(const Weight &w, const Inputs &in, int64_t begin, int64_t end, float *y) {
    _tile_loadconfig(&TILES);
    const Error error = by_bits(w.bits, [&](auto bits) { return bf16_bits<bits>(w, in, begin, end, y); });
    _tile_release();
    return error;
}

Kernels table_of(const Kernels *avx512) {
    Kernels k = *avx512;
    k.name = "amx";
    k.pack_bf16 = pack_bf16;
    k.bf16 = bf16;
    return k;
}

} // namespace

const Kernels *amx_kernels() {
    if (avx512_kernels() == nullptr) return nullptr;
    static const Kernels table = table_of(avx512_kernels());
    return &table;
}

} // namespace afpq

#else

namespace afpq {
const Kernels *amx_kernels() { return nullptr; }
} // namespace afpq

#endif
