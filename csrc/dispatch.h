// SPDX-License-Identifier: MIT
// From numbers of a call to template arguments. In an anonymous namespace, a copy for each file that includes it.
#pragma once

#include <cstdint>

namespace afpq {
namespace {

template <int N> struct Constant {
    constexpr operator int() const { return N; }
};

// run(Constant<bits>()) for 2, 3 or 4 bits, the widths that afpq.cpp accepts.
template <class Run> inline auto by_bits(int32_t bits, Run run) {
    if (bits == 4) return run(Constant<4>());
    if (bits == 3) return run(Constant<3>());
    return run(Constant<2>());
}

// run(Constant<count>()) for a count of 1 .. MOST.
template <int MOST, class Run> inline auto by_count(int64_t count, Run run) {
    if constexpr (MOST > 1)
        if (count < MOST) return by_count<MOST - 1>(count, run);
    return run(Constant<MOST>());
}

} // namespace
} // namespace afpq
