// SPDX-License-Identifier: MIT
// The library's C symbols: choose an instruction set, prepare the inputs of a call, share its rows among threads.
#include "afpq.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include <pthread.h>

using namespace afpq;

namespace {

// ---- threads: those of torch, through its C function torch_parallel_for

using Body = void (*)(int64_t begin, int64_t end, void *context);
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, Body body, void *context);

std::atomic<ParallelFor> parallel{nullptr};

template <class Work> void share(int64_t count, int64_t grain, const Work &work) {
    const Body body = [](int64_t begin, int64_t end, void *context) {
        (*static_cast<const Work *>(context))(begin, end);
    };
    const ParallelFor run = parallel.load();
    if (run == nullptr || count <= grain)
        work(0, count);
    else
        run(0, count, grain, body, const_cast<Work *>(&work));
}

// ---- kernels

std::atomic<const Kernels *> chosen{nullptr};

const Kernels *kernels_for(const Weight &w) { // the fast ones need groups that begin on whole units
    const Kernels *k = chosen.load();
    return k != nullptr && (w.groups == 1 || w.group % UNIT == 0) ? k : portable_kernels();
}

struct Free {
    void operator()(void *p) const { free(p); }
};

template <class T> std::unique_ptr<T, Free> room(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    return std::unique_ptr<T, Free>(static_cast<T *>(aligned_alloc(64, bytes)));
}

constexpr int64_t ROWS = 4;              // kernels like to take rows by fours
constexpr int64_t THREAD_BYTES = 1 << 16; // of codes, below which another thread costs more than it brings
constexpr int64_t BF16_TOKENS = 8;       // from which on tiles pay

int64_t grain_of(const Weight &w, int64_t tokens) {
    return std::max<int64_t>(1, THREAD_BYTES / (ROWS * w.row_bytes * std::min<int64_t>(tokens, 16) + 1));
}

uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// One token's inputs in 8 bits. False where they hold NaN or Inf, which only exact arithmetic passes on. Written so
// that any compiler makes vectors of it: sizes are compared as integers, and rounding is the addition of 1.5 * 2^23,
// which leaves the integer in the lowest bits.
bool quantize_inputs(const Weight &w, const float *x, int64_t stride, int8_t *q, float *steps, float *sums) {
    for (int64_t c = 0; c < stride / CHUNK; c++, x += CHUNK, q += CHUNK) {
        int32_t largest = 0; // bits of the largest magnitude
        for (int64_t i = 0; i < CHUNK; i++)
            largest = std::max(largest, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff));
        if (largest >= 0x7f800000) return false;
        float magnitude;
        memcpy(&magnitude, &largest, 4);
        const bool tiny = magnitude < 1e-35f; // too small to matter, and its inverse overflows
        steps[c] = tiny ? 0 : magnitude / 127;
        const float inverse = tiny ? 0 : 127 / magnitude;
        for (int64_t i = 0; i < CHUNK; i++) q[i] = static_cast<int8_t>(bits_of(x[i] * inverse + 12582912.0f));
    }
    q -= stride;
    for (int64_t g = 0; g < w.groups; g++) { // exact sums of the integers of a chunk, then their steps
        const int64_t end = std::min((g + 1) * w.group, w.columns);
        sums[g] = 0;
        for (int64_t first = g * w.group; first < end;) {
            const int64_t last = std::min(end, (first / CHUNK + 1) * CHUNK);
            int32_t sum = 0;
            for (int64_t i = first; i < last; i++) sum += q[i];
            sums[g] += static_cast<float>(sum) * steps[first / CHUNK];
            first = last;
        }
    }
    return true;
}

struct Call {
    const void *x;
    Kind kind; // of x, bias and y
    int64_t tokens;
    const void *bias;
    void *y;
    bool int8;
};

enum Error { DONE = 0, NO_MEMORY = 1, BAD_ARGUMENT = 2 };

Error linear(const Weight &w, const Call &call) {
    const Kernels &k = *kernels_for(w);
    const int64_t stride = (w.columns + CHUNK - 1) / CHUNK * CHUNK, size = call.kind == FLOAT32 ? 4 : 2;
    const bool bf16 = k.bf16 != nullptr && call.kind == BFLOAT16 && call.tokens >= BF16_TOKENS;
    bool int8 = call.int8 && call.tokens <= k.most_tokens;
    const auto natural = room<float>(stride), x = room<float>(bf16 ? 1 : call.tokens * stride);
    const auto q = room<int8_t>(int8 ? 2 * call.tokens * stride : 1);
    const auto steps = room<float>(call.tokens * (stride / CHUNK)), sums = room<float>(call.tokens * w.groups);
    const auto half = room<uint16_t>(bf16 ? (2 * call.tokens + 15) * stride : 1);
    const auto scratch = room<float>(call.kind == FLOAT32 ? 1 : call.tokens * w.rows);
    if (!natural || !x || !q || !steps || !sums || !half || !scratch) return NO_MEMORY;

    Inputs in = {x.get(), q.get(), steps.get(), sums.get(), half.get(), call.tokens, stride};
    const char *rows_of_x = static_cast<const char *>(call.x);
    memset(natural.get(), 0, static_cast<size_t>(4 * stride));
    if (bf16) { // already in that type
        uint16_t *padded = half.get() + (call.tokens + 15) / 16 * 16 * stride;
        for (int64_t t = 0; t < call.tokens; t++) {
            memcpy(padded + t * stride, rows_of_x + t * w.columns * size, static_cast<size_t>(2 * w.columns));
            memset(padded + t * stride + w.columns, 0, static_cast<size_t>(2 * (stride - w.columns)));
        }
        k.pack_bf16(padded, half.get(), call.tokens, stride);
    }
    for (int64_t t = 0; t < call.tokens && int8; t++) {
        int8_t *unordered = q.get() + call.tokens * stride;
        k.to_float(rows_of_x + t * w.columns * size, call.kind, natural.get(), w.columns);
        int8 = quantize_inputs(w, natural.get(), stride, unordered, steps.get() + t * (stride / CHUNK),
                               sums.get() + t * w.groups);
        if (int8) k.permute_int8(unordered, q.get() + t * stride, stride, w.bits);
    }
    for (int64_t t = 0; t < call.tokens && !int8 && !bf16; t++) {
        k.to_float(rows_of_x + t * w.columns * size, call.kind, natural.get(), w.columns);
        k.permute_exact(natural.get(), x.get() + t * stride, stride, w.bits);
    }

    float *y = call.kind == FLOAT32 ? static_cast<float *>(call.y) : scratch.get();
    const auto run = int8 ? k.int8 : bf16 ? k.bf16 : k.exact;
    share((w.rows + ROWS - 1) / ROWS, grain_of(w, call.tokens), [&](int64_t first, int64_t last) {
        run(w, in, first * ROWS, std::min(last * ROWS, w.rows), y);
    });

    if (call.bias != nullptr) {
        const auto bias = room<float>(w.rows);
        if (!bias) return NO_MEMORY;
        k.to_float(call.bias, call.kind, bias.get(), w.rows);
        for (int64_t t = 0; t < call.tokens; t++)
            for (int64_t n = 0; n < w.rows; n++) y[t * w.rows + n] += bias.get()[n];
    }
    if (call.kind != FLOAT32) k.from_float(y, call.y, call.kind, call.tokens * w.rows);
    return DONE;
}

Error dequantize(const Weight &w, int64_t begin, int64_t end, Kind kind, void *out) {
    const Kernels &k = *kernels_for(w);
    std::atomic<bool> failed{false};
    share((end - begin + ROWS - 1) / ROWS, grain_of(w, 16), [&](int64_t first, int64_t last) {
        const auto row_of_w = room<float>(kind == FLOAT32 ? 1 : w.columns);
        if (!row_of_w) failed = true;
        for (int64_t row = begin + first * ROWS; row < std::min(begin + last * ROWS, end) && !failed; row++) {
            char *to = static_cast<char *>(out) + (row - begin) * w.columns * (kind == FLOAT32 ? 4 : 2);
            k.dequantize(w, row, row + 1, kind == FLOAT32 ? reinterpret_cast<float *>(to) : row_of_w.get());
            if (kind != FLOAT32) k.from_float(row_of_w.get(), to, kind, w.columns);
        }
    });
    return failed ? NO_MEMORY : DONE;
}

// What the bytes of scales stand for: sign and k, +- 2^(low + step * k) (scales.py).
struct Levels {
    float values[256];
    explicit Levels(const float *grid) {
        if (grid == nullptr) return;
        for (int k = 0; k < 128; k++) {
            values[k] = static_cast<float>(std::exp2(static_cast<double>(grid[0]) + static_cast<double>(grid[1]) * k));
            values[128 + k] = -values[k];
        }
    }
};

bool known(int32_t kind) { return kind == FLOAT32 || kind == FLOAT16 || kind == BFLOAT16; }

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Use `function`, of torch_parallel_for's type, for threads; null: one thread. A forked child has none of its parent's
// threads and would wait for them for ever: it goes on alone.
EXPORT void afpq_set_parallel(void *function) {
    static const int once = pthread_atfork(nullptr, nullptr, [] { parallel = nullptr; });
    (void)once;
    parallel = reinterpret_cast<ParallelFor>(function);
}

// Use the kernels of this name ("amx", "avx512", "avx2", "portable"). 0, or 1 where they cannot run here.
EXPORT int afpq_select(const char *name) {
    const Kernels *k = find_kernels(name);
    if (k == nullptr) return 1;
    chosen = k;
    return 0;
}

// How a weight is handed over: the pointers and sizes of struct Weight.
#define WEIGHT                                                                                                        \
    const uint8_t *codes, const void *pos, const void *neg, const uint8_t *zeros, const float *grid,                  \
        const float *book, int64_t rows, int64_t columns, int64_t group, int64_t groups, int64_t row_bytes,           \
        int64_t zero_bytes, int32_t bits, int32_t scale_kind

#define MAKE_WEIGHT                                                                                                   \
    {codes,   pos,   neg ? neg : pos, zeros,     book,       grid ? levels.values : nullptr,  rows,                   \
     columns, group, groups,          row_bytes, zero_bytes, codes + rows * row_bytes,                                \
     bits,    static_cast<Kind>(scale_kind)}

EXPORT int afpq_linear(WEIGHT, const void *x, int32_t kind, int64_t tokens, const void *bias, void *y, int32_t int8) {
    if (!known(kind) || !(known(scale_kind) || (scale_kind == BYTES && grid)) || bits < 2 || bits > 4)
        return BAD_ARGUMENT;
    const Levels levels(grid);
    const Weight w = MAKE_WEIGHT;
    return linear(w, {x, static_cast<Kind>(kind), tokens, bias, y, int8 != 0});
}

// Rows [begin, end) as `kind`, natural order.
EXPORT int afpq_dequantize(WEIGHT, int64_t begin, int64_t end, int32_t kind, void *out) {
    if (!known(kind) || !(known(scale_kind) || (scale_kind == BYTES && grid)) || bits < 2 || bits > 4)
        return BAD_ARGUMENT;
    const Levels levels(grid);
    const Weight w = MAKE_WEIGHT;
    return dequantize(w, begin, end, static_cast<Kind>(kind), out);
}

// Read memory as fast as the machine can, for benchmarks; returns something that depends on every byte.
EXPORT uint64_t afpq_read(const uint64_t *words, int64_t count) {
    std::atomic<uint64_t> total{0};
    share(count / 32, 1 << 12, [&](int64_t first, int64_t last) {
        uint64_t sums[32] = {};
        for (const uint64_t *at = words + 32 * first; at < words + 32 * last; at += 32)
            for (int i = 0; i < 32; i++) sums[i] ^= at[i];
        uint64_t sum = 0;
        for (uint64_t s : sums) sum ^= s;
        total ^= sum;
    });
    return total;
}
