// SPDX-License-Identifier: MIT
// The AVX-512 intrinsics that csrc/x86/ uses, and AMX's (emulated_tiles.h), as plain loops written from Intel's
// descriptions, so that their results can be tested on any AVX2 machine (AFPQ_EMULATE). What AVX2 and
// below offer is the real thing. Inside namespace afpq these names hide those of <immintrin.h>.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Without optimization, <immintrin.h> has macros for what needs a constant.
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_extractf32x8_ps

namespace afpq {
namespace {

struct __m512 {
    float at[16];
};
struct __m512i {
    uint8_t at[64];
};
using __m256bh = __m256i;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

// ---- helpers: a register as lanes of T, and back

template <class T, int N> struct EmulatedLanes {
    T at[N];
};

template <class T, class V> inline EmulatedLanes<T, sizeof(V) / sizeof(T)> emulated_lanes(const V &v) {
    EmulatedLanes<T, sizeof(V) / sizeof(T)> lanes;
    memcpy(&lanes, &v, sizeof v);
    return lanes;
}

template <class V, class T, class Lane> inline V emulated_make(Lane lane) { // T, lane by lane -> register
    EmulatedLanes<T, sizeof(V) / sizeof(T)> lanes;
    for (unsigned i = 0; i < sizeof(V) / sizeof(T); i++) lanes.at[i] = lane(i);
    V v;
    memcpy(&v, &lanes, sizeof v);
    return v;
}

template <class Lane> inline __m512 emulated_floats(Lane lane) { return emulated_make<__m512, float>(lane); }

inline void emulated_check(bool good, const char *what) {
    if (good) return;
    fprintf(stderr, "emulated instruction: %s\n", what);
    abort();
}

inline void emulated_aligned(const void *p) {
    emulated_check(reinterpret_cast<uintptr_t>(p) % 64 == 0, "address not a multiple of 64"); // a fault, really
}

// ---- memory

inline __m512 _mm512_loadu_ps(const void *p) {
    __m512 v;
    memcpy(&v, p, 64);
    return v;
}
inline __m512i _mm512_loadu_si512(const void *p) {
    __m512i v;
    memcpy(&v, p, 64);
    return v;
}
inline __m512 _mm512_load_ps(const void *p) { return emulated_aligned(p), _mm512_loadu_ps(p); }
inline __m512i _mm512_load_si512(const void *p) { return emulated_aligned(p), _mm512_loadu_si512(p); }
inline void _mm512_storeu_ps(void *p, __m512 v) { memcpy(p, &v, 64); }
inline void _mm512_storeu_si512(void *p, __m512i v) { memcpy(p, &v, 64); }
inline void _mm512_store_ps(void *p, __m512 v) { emulated_aligned(p), _mm512_storeu_ps(p, v); }
inline void _mm512_store_si512(void *p, __m512i v) { emulated_aligned(p), _mm512_storeu_si512(p, v); }

// Masked: bytes without a bit are neither read nor written.
inline __m256i _mm256_maskz_loadu_epi8(__mmask32 k, const void *p) {
    const uint8_t *from = static_cast<const uint8_t *>(p);
    return emulated_make<__m256i, uint8_t>([&](int i) -> uint8_t { return k >> i & 1 ? from[i] : 0; });
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 k, const void *p) {
    const uint8_t *from = static_cast<const uint8_t *>(p);
    return emulated_make<__m512i, uint8_t>([&](int i) -> uint8_t { return k >> i & 1 ? from[i] : 0; });
}
inline void _mm512_mask_storeu_ps(void *p, __mmask16 k, __m512 v) {
    for (int i = 0; i < 16; i++)
        if (k >> i & 1) memcpy(static_cast<char *>(p) + 4 * i, v.at + i, 4);
}
inline void _mm512_mask_storeu_epi32(void *p, __mmask16 k, __m512i v) {
    for (int i = 0; i < 16; i++)
        if (k >> i & 1) memcpy(static_cast<char *>(p) + 4 * i, v.at + 4 * i, 4);
}

// ---- making and moving

inline __m512 _mm512_set1_ps(float a) {
    return emulated_floats([&](int) { return a; });
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0); }
inline __m512i _mm512_set1_epi8(char a) {
    return emulated_make<__m512i, char>([&](int) { return a; });
}
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi8(0); }
inline __m512i _mm512_zextsi256_si512(__m256i a) {
    __m512i v = _mm512_setzero_si512();
    memcpy(&v, &a, 32);
    return v;
}
inline __m512i _mm512_broadcast_i64x4(__m256i a) {
    __m512i v;
    memcpy(v.at, &a, 32), memcpy(v.at + 32, &a, 32);
    return v;
}
inline __m512i _mm512_mask_broadcast_i32x4(__m512i src, __mmask16 k, __m128i a) {
    const auto old = emulated_lanes<uint32_t>(src);
    const auto four = emulated_lanes<uint32_t>(a);
    return emulated_make<__m512i, uint32_t>([&](int i) { return k >> i & 1 ? four.at[i % 4] : old.at[i]; });
}
inline __m512 _mm512_mask_mov_ps(__m512 src, __mmask16 k, __m512 a) {
    return emulated_floats([&](int i) { return k >> i & 1 ? a.at[i] : src.at[i]; });
}
inline __m256 _mm512_extractf32x8_ps(__m512 a, int upper) {
    emulated_check(upper == 0 || upper == 1, "half 0 or 1");
    return emulated_make<__m256, float>([&](int i) { return a.at[8 * upper + i]; });
}
inline __m256 _mm512_castps512_ps256(__m512 a) { return _mm512_extractf32x8_ps(a, 0); }

// ---- permutations: index bits beyond the table's size are ignored

inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) {
    const auto at = emulated_lanes<uint32_t>(index);
    return emulated_floats([&](int i) { return a.at[at.at[i] & 15]; });
}
inline __m512 _mm512_mask_permutexvar_ps(__m512 src, __mmask16 k, __m512i index, __m512 a) {
    return _mm512_mask_mov_ps(src, k, _mm512_permutexvar_ps(index, a));
}
inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i a) {
    return emulated_make<__m512i, uint8_t>([&](int i) { return a.at[index.at[i] & 63]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
    const auto at = emulated_lanes<uint16_t>(index), words = emulated_lanes<uint16_t>(a);
    return emulated_make<__m512i, uint16_t>([&](int i) { return words.at[at.at[i] & 31]; });
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
    const auto at = emulated_lanes<uint32_t>(index), x = emulated_lanes<uint32_t>(a), y = emulated_lanes<uint32_t>(b);
    return emulated_make<__m512i, uint32_t>([&](int i) { return (at.at[i] & 16 ? y : x).at[at.at[i] & 15]; });
}
inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i index) { // within 128 bits; zero where bit 7 is set
    return emulated_make<__m512i, uint8_t>([&](int i) -> uint8_t {
        return index.at[i] & 128 ? 0 : a.at[i / 16 * 16 + (index.at[i] & 15)];
    });
}

// ---- integers

inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return emulated_make<__m512i, uint8_t>([&](int i) { return a.at[i] & b.at[i]; });
}
template <class T> inline __m512i emulated_shift_right(__m512i a, __m512i count) { // zero from the width on
    const auto x = emulated_lanes<T>(a), n = emulated_lanes<T>(count);
    return emulated_make<__m512i, T>([&](int i) -> T { return n.at[i] < 8 * sizeof(T) ? x.at[i] >> n.at[i] : 0; });
}
inline __m512i _mm512_srlv_epi16(__m512i a, __m512i count) { return emulated_shift_right<uint16_t>(a, count); }
inline __m512i _mm512_srlv_epi32(__m512i a, __m512i count) { return emulated_shift_right<uint32_t>(a, count); }
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
    return _mm512_srlv_epi16(a, emulated_make<__m512i, uint16_t>([&](int) { return static_cast<uint16_t>(n); }));
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
    return _mm512_srlv_epi32(a, emulated_make<__m512i, uint32_t>([&](int) { return n; }));
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    const auto x = emulated_lanes<uint8_t>(a);
    return emulated_make<__m512i, uint32_t>([&](int i) { return x.at[i]; });
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const auto x = emulated_lanes<uint16_t>(a);
    return emulated_make<__m512i, uint32_t>([&](int i) { return x.at[i]; });
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) { // cuts off
    const auto x = emulated_lanes<uint32_t>(a);
    return emulated_make<__m128i, uint8_t>([&](int i) { return static_cast<uint8_t>(x.at[i]); });
}
// Byte i of a 64-bit lane: the 8 bits of `a`'s lane from bit `control` (6 bits of byte i) on, around the end.
inline __m512i _mm512_multishift_epi64_epi8(__m512i control, __m512i a) {
    const auto x = emulated_lanes<uint64_t>(a);
    return emulated_make<__m512i, uint8_t>([&](int i) {
        uint8_t byte = 0;
        for (int bit = 0; bit < 8; bit++)
            byte |= static_cast<uint8_t>((x.at[i / 8] >> ((control.at[i] + bit) & 63) & 1) << bit);
        return byte;
    });
}
// Four products of unsigned and signed bytes onto each sum, which wraps.
inline __m512i _mm512_dpbusd_epi32(__m512i src, __m512i u, __m512i s) {
    const auto sums = emulated_lanes<uint32_t>(src);
    const auto y = emulated_lanes<int8_t>(s);
    return emulated_make<__m512i, uint32_t>([&](int i) {
        int32_t sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; j++) sum += int32_t(u.at[j]) * y.at[j];
        return sums.at[i] + static_cast<uint32_t>(sum);
    });
}

// ---- floats

inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    return emulated_floats([&](int i) { return a.at[i] + b.at[i]; });
}
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
    return emulated_floats([&](int i) { return a.at[i] - b.at[i]; });
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    return emulated_floats([&](int i) { return a.at[i] * b.at[i]; });
}
inline __m512 _mm512_div_ps(__m512 a, __m512 b) {
    return emulated_floats([&](int i) { return a.at[i] / b.at[i]; });
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { // the second one where either is NaN
    return emulated_floats([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
    return emulated_floats([&](int i) { return std::fabs(a.at[i]); });
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated_floats([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
    return emulated_floats([&](int i) { return std::fma(-a.at[i], b.at[i], c.at[i]); });
}
inline float _mm512_reduce_add_ps(__m512 a) {
    for (int n = 8; n > 0; n /= 2)
        for (int i = 0; i < n; i++) a.at[i] += a.at[i + n];
    return a.at[0];
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    const auto x = emulated_lanes<int32_t>(a);
    return emulated_floats([&](int i) { return static_cast<float>(x.at[i]); });
}
inline __m512i _mm512_cvtps_epi32(__m512 a) { // to nearest, ties to even; what does not fit: 0x80000000
    return emulated_make<__m512i, int32_t>([&](int i) -> int32_t {
        const float x = std::nearbyint(a.at[i]);
        return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(x) : INT32_MIN;
    });
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) { // to nearest, ties to even; subnormal numbers count as zero
    const auto x = emulated_lanes<uint32_t>(a);
    return emulated_make<__m256bh, uint16_t>([&](int i) {
        uint32_t bits = x.at[i];
        const uint32_t magnitude = bits & 0x7fffffff;
        if (magnitude < 0x00800000) bits &= 0x80000000;
        if (magnitude > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    });
}

} // namespace
} // namespace afpq

#include "emulated_tiles.h"
