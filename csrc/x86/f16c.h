// SPDX-License-Identifier: MIT
// What kernels for processors with F16C share: vectors of 16-bit numbers, and bytes, <-> float32. All of it is in an
// anonymous namespace, a copy for each file, compiled with that file's flags: nothing of it may be merged by the
// linker with code that runs elsewhere. The file includes its intrinsics first (the tests replace some of them).
#pragma once

#include "../afpq.h"
#include "../dispatch.h"
#include "../float16.h"
#include "../scratch.h"

#include <cstring>

namespace afpq {
namespace {

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
        for (; i < count; i++) out[i] = bf16_to_float(from[i]);
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
        for (; i < count; i++) to[i] = float_to_bf16(in[i]);
    }
}

} // namespace
} // namespace afpq
