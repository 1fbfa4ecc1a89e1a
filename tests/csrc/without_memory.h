// SPDX-License-Identifier: MIT
// Calls without memory: each allocation of the kernels fails once, in every path, also through the C symbols.
#pragma once

#include "cases.h"

#include <cstdio>

using namespace afpq;

// The linker sends allocations of the kernels here (--wrap=aligned_alloc): after `before_failure` of them one fails.
static int64_t before_failure = INT64_MAX;
extern "C" void *__real_aligned_alloc(size_t alignment, size_t size);
extern "C" void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    if (before_failure != INT64_MAX && before_failure-- == 0) return nullptr;
    return __real_aligned_alloc(alignment, size);
}

extern "C" { // of csrc/afpq.cpp
int afpq_select(const char *name);
int64_t afpq_weight_bytes();
int afpq_linear(const Weight *, const void *x, int32_t kind, int64_t tokens, const void *bias, void *y, int32_t int8);
int afpq_dequantize(const Weight *, int64_t begin, int64_t end, int32_t kind, void *out);
}

namespace {

void expect(const char *table, const char *what, Error got, Error want) {
    if (got == want) return;
    printf("%s %s: error %d, not %d\n", table, what, got, want);
    exit(1);
}

// Fails the first allocation of a call, then the second, ..., until all succeed: NO_MEMORY each time, and never a
// crash. Returns how many there are. The last call's results stay.
template <class Call> int64_t check_without_memory(const char *table, const char *what, Call call) {
    for (int64_t count = 0;; count++) {
        before_failure = count;
        const Error error = call();
        const bool failed = before_failure < 0;
        before_failure = INT64_MAX;
        expect(table, what, error, failed ? NO_MEMORY : DONE);
        if (!failed) return count;
    }
}

// The C symbols: every path with every allocation failing once.
void check_library() {
    int64_t failures = 0;
    for (const char *name : {"portable", "avx2"}) {
        if (afpq_select(name) != 0) continue;
        for (const Sides sides : {TWO, ZEROS})
            for (const Kind kind : {FLOAT32, FLOAT16, BFLOAT16})
                for (const int64_t tokens : {1, 9})
                    for (const int32_t int8 : {0, 1}) {
                        const Case c({4, 64, 200, 9, sides, BYTES});
                        Weight w = c.weight();
                        w.levels = nullptr, w.end = nullptr; // the library's part
                        const int64_t size = kind == FLOAT32 ? 4 : 2;
                        Array<uint8_t> x(tokens * 200 * size), bias(9 * size), y(tokens * 9 * size), out(9 * 200 * size);
                        memset(x.data, 0, static_cast<size_t>(x.count));
                        memset(bias.data, 0, static_cast<size_t>(bias.count));
                        failures += check_without_memory(name, "afpq_linear", [&] {
                            return Error(afpq_linear(&w, x.data, kind, tokens, bias.data, y.data, int8));
                        });
                        failures += check_without_memory(name, "afpq_dequantize", [&] {
                            return Error(afpq_dequantize(&w, 0, 9, kind, out.data));
                        });
                    }
    }
    Weight w = {};
    w.bits = 5;
    expect("library", "afpq_linear", Error(afpq_linear(&w, nullptr, FLOAT32, 1, nullptr, nullptr, 0)), BAD_ARGUMENT);
    expect("library", "afpq_dequantize", Error(afpq_dequantize(&w, 0, 1, FLOAT32, nullptr)), BAD_ARGUMENT);
    if (afpq_weight_bytes() != sizeof(Weight) || failures < 100) {
        printf("library: %lld failed allocations\n", static_cast<long long>(failures));
        exit(1);
    }
    printf("library: %lld failed allocations\n", static_cast<long long>(failures));
}

} // namespace
