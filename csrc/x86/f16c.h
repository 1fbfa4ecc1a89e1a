// SPDX-License-Identifier: MIT
// What kernels for processors with F16C share: scratch memory, and numbers of 16 bits and bytes <-> float32. All of it is
// in an anonymous namespace, a copy for each file, compiled with that file's flags: nothing of it may be merged by the
// linker with code that runs elsewhere. The file includes its intrinsics first (the tests replace some of them).
#pragma once

#include "../afpq.h"

#include <cstdlib>
#include <cstring>

namespace afpq {
namespace {

struct Scratch { // aligned, freed with its scope
    explicit Scratch(int64_t count) : data(static_cast<float *>(aligned_alloc(64, (4 * count + 127) / 64 * 64))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    float *data;
};

inline void convert(const void *in, Kind kind, int64_t first, int64_t count, float *out) {
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

// Scales [first, first + count) as float32; `scales` are w.pos or w.neg.
inline void convert(const Weight &w, const void *scales, int64_t first, int64_t count, float *out) {
    if (w.levels) {
        const uint8_t *bytes = static_cast<const uint8_t *>(scales) + first;
        for (int64_t i = 0; i < count; i++) out[i] = w.levels[bytes[i]];
    } else {
        convert(scales, w.scale_kind, first, count, out);
    }
}

inline void to_float(const void *in, Kind kind, float *out, int64_t count) { convert(in, kind, 0, count, out); }

inline void from_float(const float *in, void *out, Kind kind, int64_t count) {
    if (kind == FLOAT32) {
        memcpy(out, in, static_cast<size_t>(4 * count));
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(out);
    int64_t i = 0;
    if (kind == FLOAT16) {
        for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
        for (; i < count; i++) to[i] = static_cast<uint16_t>(_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT));
    } else {
        for (; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, in + i, 4);
            const bool nan = (bits & 0x7fffffff) > 0x7f800000; // rounding up could turn it into infinity
            to[i] = static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
}

} // namespace
} // namespace afpq
