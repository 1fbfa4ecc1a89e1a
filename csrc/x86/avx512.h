// SPDX-License-Identifier: MIT
// What the AVX-512 (F, BW, VL, DQ, VNNI, VBMI: Ice Lake, Zen 4 and later) and AMX kernels share. All of it is in an
// anonymous namespace, a copy for each file that includes it: nothing compiled with these flags may be merged by the
// linker with code that runs elsewhere.
//
// The tests run these kernels on any AVX2 machine: with AFPQ_EMULATE the intrinsics are plain loops (tests/csrc).
#pragma once

#include "../afpq.h"

#if defined(AFPQ_EMULATE) || (defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) &&               \
                              defined(__AVX512DQ__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) &&          \
                              defined(__FMA__) && defined(__F16C__))
#define AFPQ_AVX512 // the compiler can build them

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
#include <cstring>

#define UNROLL _Pragma("GCC unroll 6") // before arrays of registers are taken apart: otherwise they stay in memory

namespace afpq {

namespace avx512 { // one file each
constexpr int MOST_TOKENS = 6; // that `int8` takes
void permute_exact(const float *in, float *out, int64_t count, int32_t bits);
void permute_int8(const int8_t *in, int8_t *out, int64_t count, int32_t bits);
Error exact(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
Error int8(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);
Error dequantize(const Weight &, int64_t begin, int64_t end, float *out);
} // namespace avx512

namespace {

// ---- codes

template <int BITS> constexpr int64_t UNIT_BYTES = 4 * BITS;
constexpr int64_t AHEAD = 4096; // bytes of codes to prefetch: a page, where the processor's own prefetching stops

// 32 bytes; near the end of the weight only what is there is read, the rest is zero.
inline __m256i load_pair(const uint8_t *codes, const uint8_t *end) {
    if (end - codes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes));
    return _mm256_maskz_loadu_epi8((1u << (end - codes)) - 1, codes);
}

// Lane l gets the bytes from bit `first + step * l` on, shifted so that this bit is its lowest.
template <class Lane> struct Spread {
    static constexpr int BYTES = sizeof(Lane), LANES = 64 / BYTES;
    alignas(64) uint8_t bytes[64] = {};
    alignas(64) Lane shifts[LANES] = {};
    constexpr Spread(int step, int first) {
        for (int lane = 0; lane < LANES; lane++) {
            const int bit = first + step * lane;
            for (int i = 0; i < BYTES; i++) // two suffice
                bytes[BYTES * lane + i] = static_cast<uint8_t>(bit / 8 + (i > 0));
            shifts[lane] = static_cast<Lane>(bit % 8);
        }
    }
    inline __m512i operator()(__m256i codes) const {
        const __m512i wide = _mm512_permutexvar_epi8(_mm512_load_si512(bytes), _mm512_zextsi256_si512(codes));
        if constexpr (BYTES == 2) return _mm512_srlv_epi16(wide, _mm512_load_si512(shifts));
        return _mm512_srlv_epi32(wide, _mm512_load_si512(shifts));
    }
};

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

inline int32_t zero_at(const Weight &w, int64_t row, int64_t group) {
    const uint8_t *packed = w.zeros + group * w.zero_bytes;
    const int64_t bit = row * w.bits, byte = bit / 8;
    const uint32_t two = packed[byte] | (byte + 1 < w.zero_bytes ? packed[byte + 1] << 8 : 0);
    return static_cast<int32_t>(two >> (bit % 8) & ((1u << w.bits) - 1));
}

// pos and neg of a row's groups [first, last); with zeros, neg becomes zero * scale (exact: 11 bits times 4).
inline void row_scales(const Weight &w, int64_t row, int64_t first, int64_t last, float *pos, float *neg) {
    const int64_t count = last - first;
    convert(w, w.pos, row * w.groups + first, count, pos);
    if (w.zeros)
        for (int64_t g = 0; g < count; g++) neg[g] = static_cast<float>(zero_at(w, row, first + g)) * pos[g];
    else if (w.neg != w.pos)
        convert(w, w.neg, row * w.groups + first, count, neg);
    else
        memcpy(neg, pos, static_cast<size_t>(4 * count));
}

} // namespace
} // namespace afpq

#endif
