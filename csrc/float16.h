// SPDX-License-Identifier: MIT
// Scalar conversions between float32 and the two types of 16 bits. In an anonymous namespace, a copy for each file,
// compiled with that file's flags: nothing of it may be merged by the linker with code that runs elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace afpq {
namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 0) { // zero and subnormal numbers: fraction * 2^-24
        const float value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    return float_of(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

inline uint16_t float_to_half(float value) { // to nearest, ties to even
    uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;  // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00; // rounds to infinity
    if (bits < 0x38800000)                        // subnormal: the addition rounds to multiples of 2^-24
        return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13));
}

inline float bf16_to_float(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bf16(float value) { // to nearest, ties to even
    const uint32_t bits = bits_of(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000; // rounding up could turn it into infinity
    return static_cast<uint16_t>(nan ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

} // namespace
} // namespace afpq
