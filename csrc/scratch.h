// SPDX-License-Identifier: MIT
// Memory for one call. In an anonymous namespace, a copy for each file that includes it: nothing compiled with one
// file's flags may be merged by the linker with code that runs elsewhere.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace afpq {
namespace {

// `count` values, aligned to 64 bytes and freed with its scope. `data` is null if there is no memory: check `!scratch`
// and return NO_MEMORY.
template <class T> struct Scratch {
    explicit Scratch(int64_t count)
        : data(static_cast<T *>(aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool operator!() const { return data == nullptr; }
    T *data;
};

} // namespace
} // namespace afpq
