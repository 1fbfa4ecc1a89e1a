// SPDX-License-Identifier: MIT
// The library's C symbols: choose an instruction set, prepare the inputs of a call, share its rows among threads.
#include "afpq.h"
#include "float16.h"
#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

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

constexpr int64_t ROWS = 4;              // kernels like to take rows by fours
constexpr int64_t THREAD_BYTES = 1 << 16; // of codes, below which another thread costs more than it brings
constexpr int64_t BF16_TOKENS = 8;       // from which on tiles pay

int64_t grain_of(const Weight &w, int64_t tokens) {
    return std::max<int64_t>(1, THREAD_BYTES / (ROWS * w.row_bytes * std::min<int64_t>(tokens, 16) + 1));
}

// One token's inputs in 8 bits. False if they hold NaN or Inf, which only exact arithmetic passes on. Written so
// that any compiler makes vectors of it: sizes are compared as integers, and rounding is the addition of 1.5 * 2^23,
// which leaves the integer in the lowest bits.
bool quantize_inputs(const Weight &w, const float *x, int64_t stride, int8_t *q, float *steps, float *sums) {
    for (int64_t c = 0; c < stride / CHUNK; c++, x += CHUNK, q += CHUNK) {
        int32_t largest = 0; // bits of the largest magnitude
        for (int64_t i = 0; i < CHUNK; i++)
            largest = std::max(largest, static_cast<int32_t>(bits_of(x[i]) & 0x7fffffff));
        if (largest >= 0x7f800000) return false;
        const float magnitude = float_of(static_cast<uint32_t>(largest));
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

Error linear(const Weight &w, const Call &call) {
    const Kernels &k = *kernels_for(w);
    const int64_t stride = (w.columns + CHUNK - 1) / CHUNK * CHUNK, size = call.kind == FLOAT32 ? 4 : 2;
    const bool bf16 = k.bf16 != nullptr && call.kind == BFLOAT16 && call.tokens >= BF16_TOKENS;
    bool int8 = call.int8 && call.tokens <= k.most_tokens;
    const Scratch<float> natural(stride), x(bf16 ? 1 : call.tokens * stride);
    const Scratch<int8_t> q(int8 ? 2 * call.tokens * stride : 1);
    const Scratch<float> steps(call.tokens * (stride / CHUNK)), sums(call.tokens * w.groups);
    const Scratch<uint16_t> half(bf16 ? (2 * call.tokens + 15) * stride : 1);
    const Scratch<float> result(call.kind == FLOAT32 ? 1 : call.tokens * w.rows), bias(call.bias ? w.rows : 1);
    if (!natural || !x || !q || !steps || !sums || !half || !result || !bias) return NO_MEMORY;

    Inputs in = {x.data, q.data, steps.data, sums.data, half.data, call.tokens, stride};
    const char *rows_of_x = static_cast<const char *>(call.x);
    memset(natural.data, 0, static_cast<size_t>(4 * stride));
    if (bf16) { // already in that type
        uint16_t *padded = half.data + (call.tokens + 15) / 16 * 16 * stride;
        for (int64_t t = 0; t < call.tokens; t++) {
            memcpy(padded + t * stride, rows_of_x + t * w.columns * size, static_cast<size_t>(2 * w.columns));
            memset(padded + t * stride + w.columns, 0, static_cast<size_t>(2 * (stride - w.columns)));
        }
        k.pack_bf16(padded, half.data, call.tokens, stride);
    }
    for (int64_t t = 0; t < call.tokens && int8; t++) {
        int8_t *unordered = q.data + call.tokens * stride;
        k.to_float(rows_of_x + t * w.columns * size, call.kind, natural.data, w.columns);
        int8 = quantize_inputs(w, natural.data, stride, unordered, steps.data + t * (stride / CHUNK),
                               sums.data + t * w.groups);
        if (int8) k.permute_int8(unordered, q.data + t * stride, stride, w.bits);
    }
    for (int64_t t = 0; t < call.tokens && !int8 && !bf16; t++) {
        k.to_float(rows_of_x + t * w.columns * size, call.kind, natural.data, w.columns);
        k.permute_exact(natural.data, x.data + t * stride, stride, w.bits);
    }

    float *y = call.kind == FLOAT32 ? static_cast<float *>(call.y) : result.data;
    const auto run = int8 ? k.int8 : bf16 ? k.bf16 : k.exact;
    std::atomic<Error> error{DONE};
    share((w.rows + ROWS - 1) / ROWS, grain_of(w, call.tokens), [&](int64_t first, int64_t last) {
        const Error part = run(w, in, first * ROWS, std::min(last * ROWS, w.rows), y);
        if (part != DONE) error = part;
    });
    if (error != DONE) return error;

    if (call.bias != nullptr) {
        k.to_float(call.bias, call.kind, bias.data, w.rows);
        for (int64_t t = 0; t < call.tokens; t++)
            for (int64_t n = 0; n < w.rows; n++) y[t * w.rows + n] += bias.data[n];
    }
    if (call.kind != FLOAT32) k.from_float(y, call.y, call.kind, call.tokens * w.rows);
    return DONE;
}

Error dequantize(const Weight &w, int64_t begin, int64_t end, Kind kind, void *out) {
    const Kernels &k = *kernels_for(w);
    const int64_t size = kind == FLOAT32 ? 4 : 2;
    std::atomic<Error> error{DONE};
    share((end - begin + ROWS - 1) / ROWS, grain_of(w, 16), [&](int64_t first, int64_t last) {
        const Scratch<float> decoded(kind == FLOAT32 ? 1 : w.columns);
        if (!decoded) error = NO_MEMORY;
        for (int64_t row = begin + first * ROWS; row < std::min(begin + last * ROWS, end) && error == DONE; row++) {
            char *to = static_cast<char *>(out) + (row - begin) * w.columns * size;
            const Error part =
                k.dequantize(w, row, row + 1, kind == FLOAT32 ? reinterpret_cast<float *>(to) : decoded.data);
            if (part != DONE)
                error = part;
            else if (kind != FLOAT32)
                k.from_float(decoded.data, to, kind, w.columns);
        }
    });
    return error;
}

// The values of scales that are bytes: a sign and k, +- 2^(low + step * k) (numerics/scales.py).
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

bool is_float(int32_t kind) { return kind == FLOAT32 || kind == FLOAT16 || kind == BFLOAT16; }

bool is_valid(const Weight &w) {
    return (is_float(w.scale_kind) || (w.scale_kind == BYTES && w.grid)) && w.bits >= 2 && w.bits <= 4;
}

Weight completed(Weight w, const Levels &levels) {
    if (w.neg == nullptr) w.neg = w.pos;
    w.levels = w.grid ? levels.values : nullptr;
    w.end = w.codes + w.rows * w.row_bytes;
    return w;
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Use `function`, of torch_parallel_for's type, for threads; null: one thread. A forked child has none of its parent's
// threads and would wait for them for ever: it goes on alone.
EXPORT void afpq_set_parallel(void *function) {
    static const int once = pthread_atfork(nullptr, nullptr, [] { parallel = nullptr; });
    (void)once;
    parallel = reinterpret_cast<ParallelFor>(function);
}

// Use the kernels of this name ("amx", "avx512", "avx2", "portable"). 0, or 1 if they cannot run here.
EXPORT int afpq_select(const char *name) {
    const Kernels *k = find_kernels(name);
    if (k == nullptr) return 1;
    chosen = k;
    return 0;
}

// sizeof(Weight), so that a caller can check that it describes weights as this library was compiled to read them.
EXPORT int64_t afpq_weight_bytes() { return sizeof(Weight); }

EXPORT int afpq_linear(const Weight *weight, const void *x, int32_t kind, int64_t tokens, const void *bias, void *y,
                       int32_t int8) {
    if (!is_float(kind) || !is_valid(*weight)) return BAD_ARGUMENT;
    const Levels levels(weight->grid);
    return linear(completed(*weight, levels), {x, static_cast<Kind>(kind), tokens, bias, y, int8 != 0});
}

// Rows [begin, end) as `kind`, natural order.
EXPORT int afpq_dequantize(const Weight *weight, int64_t begin, int64_t end, int32_t kind, void *out) {
    if (!is_float(kind) || !is_valid(*weight)) return BAD_ARGUMENT;
    const Levels levels(weight->grid);
    return dequantize(completed(*weight, levels), begin, end, static_cast<Kind>(kind), out);
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
