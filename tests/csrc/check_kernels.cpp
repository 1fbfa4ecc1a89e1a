// SPDX-License-Identifier: MIT
// Checks every function of every kernel table that is linked and not null against scalar float64 code that reads the
// bit stream on its own. Prints a line per table; exits nonzero at the first failure. With -fsanitize=address it also
// finds reads behind the codes: these, like all buffers here, end where their memory ends.
//
// Bounds, per output: exact arithmetic 1e-5 of sum |w x|; bfloat16 2^-8 of it (each weight is rounded by up to that);
// dequantized weights 1e-6 of themselves. int8: the reference is computed from the rounded inputs, so that theirs (step
// / 2 for each |w|) needs no bound; each weight may be off by a share of its group's step, largest entry of the book *
// larger scale / levels, times |x|: a half for rounding, a little more where the scales' ratio is rounded as well, and
// a thousandth for float32. With zero points only the last remains, the step being the scale.
#include "afpq.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

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

struct Candidate {
    const Kernels *kernels;
    double levels, error; // of int8 weights: steps up to the largest one, and how many of them one may be off
};

uint64_t state = 88172645463325252ull;

uint32_t random_bits() { // xorshift
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
}
double uniform() { return random_bits() / 4294967296.0; }

double bf16_value(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
double f16_value(uint16_t bits) { // positive, normal or zero
    return bits == 0 ? 0 : std::ldexp(1 + (bits & 1023) / 1024.0, (bits >> 10) - 15);
}

template <class T> struct Array { // exactly as long as asked for, in memory of its own, aligned where the size allows
    explicit Array(int64_t count) : count(count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T);
        data = static_cast<T *>(bytes % 64 ? malloc(bytes) : aligned_alloc(64, bytes));
    }
    ~Array() { free(data); }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
    T &operator[](int64_t i) { return data[i]; }
    const T &operator[](int64_t i) const { return data[i]; }
    int64_t count;
    T *data;
};

enum Sides { ONE, TWO, ZEROS };

struct Shape {
    int32_t bits;
    int64_t group, columns, rows; // group -1: one for the row
    Sides sides;
    Kind kind;
};

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Case { // a random weight, and what it stands for
    Shape shape;
    int64_t group, groups, row_bytes, zero_bytes, scale_bytes;
    Array<uint8_t> codes, pos, neg, zeros;
    float book[16], levels[256], grid[2] = {-8, 0.03f};
    std::vector<double> values, larger, zero; // [rows, columns], [rows, groups] twice

    explicit Case(Shape s)
        : shape(s), group(s.group < 0 ? s.columns : s.group), groups(divide(s.columns, group)),
          row_bytes(s.bits == 3 ? divide(s.columns, 8) * 3 : divide(s.columns * s.bits, 8)),
          zero_bytes(s.bits == 3 ? divide(s.rows, 8) * 3 : divide(s.rows * s.bits, 8)),
          scale_bytes(s.kind == BYTES ? 1 : s.kind == FLOAT32 ? 4 : 2), codes(s.rows * row_bytes), pos(s.rows * groups * scale_bytes),
          neg(s.rows * groups * scale_bytes), zeros(groups * zero_bytes) {
        for (int64_t i = 0; i < codes.count; i++) codes[i] = static_cast<uint8_t>(random_bits());
        for (int64_t i = 0; i < zeros.count; i++) zeros[i] = static_cast<uint8_t>(random_bits());
        const int size = 1 << s.bits;
        for (int i = 0; i < size; i++) // the positive side reaches 1, the negative one -0.9; entry 0 is 0
            book[i] = static_cast<float>(i == 0 ? 0 : i % 2 ? double(i) / (size - 1) : -0.9 * i / (size - 2));
        for (int k = 0; k < 128; k++) {
            levels[k] = static_cast<float>(std::exp2(-8 + k * 0.03));
            levels[128 + k] = -levels[k];
        }
        std::vector<double> p(static_cast<size_t>(s.rows * groups)), n(p.size());
        for (size_t i = 0; i < p.size(); i++) {
            const bool mirrored = random_bits() % 4 == 0;
            p[i] = random_scale(pos.data, i, mirrored);
            n[i] = random_scale(neg.data, i, mirrored);
            larger.push_back(s.sides == TWO ? std::fmax(std::fabs(p[i]), std::fabs(n[i])) : std::fabs(p[i]));
        }
        for (int64_t row = 0; row < s.rows; row++)
            for (int64_t k = 0; k < s.columns; k++) {
                const size_t g = static_cast<size_t>(row * groups + k / group);
                const uint32_t code = field(codes.data + row * row_bytes, k);
                const double zero_point = field(zeros.data + k / group * zero_bytes, row);
                const double side = s.sides == TWO && book[code] < 0 ? n[g] : p[g];
                values.push_back(s.sides == ZEROS ? (code - zero_point) * p[g] : book[code] * side);
                if (k % group == 0) zero.push_back(zero_point);
            }
    }

    uint32_t field(const uint8_t *stream, int64_t i) const { // bit by bit
        uint32_t value = 0;
        for (int64_t b = 0; b < shape.bits; b++) {
            const int64_t bit = i * shape.bits + b;
            value |= static_cast<uint32_t>(stream[bit / 8] >> (bit % 8) & 1) << b;
        }
        return value;
    }

    double random_scale(uint8_t *at, size_t i, bool mirrored) const { // 2^-8 to 2^-4, or sometimes none, and a sign
        const bool none = random_bits() % 16 == 0;
        const double sign = mirrored ? -1 : 1;
        if (shape.kind == BYTES) {
            at[i] = static_cast<uint8_t>(random_bits() % 128 + (mirrored ? 128 : 0));
            return levels[at[i]];
        }
        if (shape.kind == FLOAT32) {
            const double size = none ? 0 : std::ldexp(1 + uniform(), -8 + int(random_bits() % 4));
            const float value = static_cast<float>(sign * size);
            memcpy(at + 4 * i, &value, 4);
            return value;
        }
        const int fraction_bits = shape.kind == FLOAT16 ? 10 : 7;
        const uint32_t exponent = (shape.kind == FLOAT16 ? 7 : 119) + random_bits() % 4;
        const uint32_t fraction = random_bits() % (1u << fraction_bits);
        const uint16_t size = none ? 0 : static_cast<uint16_t>(exponent << fraction_bits | fraction);
        const uint16_t bits = static_cast<uint16_t>(size | (mirrored ? 0x8000 : 0));
        memcpy(at + 2 * i, &bits, 2);
        return sign * (shape.kind == FLOAT16 ? f16_value(size) : bf16_value(size));
    }

    Weight weight() const {
        const uint8_t *negative = shape.sides == TWO ? neg.data : pos.data;
        const uint8_t *zero_points = shape.sides == ZEROS ? zeros.data : nullptr;
        const bool bytes = shape.kind == BYTES;
        return {codes.data, pos.data, negative, zero_points, bytes ? grid : nullptr, book,
                shape.rows, shape.columns, group, groups, row_bytes, zero_bytes, shape.bits, shape.kind,
                bytes ? levels : nullptr, codes.data + row_bytes * shape.rows};
    }
};

void fail(const char *table, const char *what, const Case &c, int64_t tokens, int64_t token, int64_t row, double got,
          double want, double bound) {
    static const char *const SIDES[] = {"one scale", "two scales", "zero points"};
    static const char *const KINDS[] = {"f32", "f16", "bf16", "bytes"};
    using Long = long long;
    printf("%s %s: bits %d group %lld columns %lld rows %lld, %s %s, tokens %lld: [%lld, %lld] is %.9g, ", table, what,
           c.shape.bits, Long(c.shape.group), Long(c.shape.columns), Long(c.shape.rows), SIDES[c.shape.sides],
           KINDS[c.shape.kind], Long(tokens), Long(token), Long(row), got);
    printf("not %.9g +- %.3g\n", want, bound);
    exit(1);
}

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

using Product = Error (*)(const Weight &, const Inputs &, int64_t begin, int64_t end, float *y);

// Runs two ranges of rows, as two threads would, and compares: bound(row, token) is asked where the rows are right.
template <class Bound>
void compare(const Kernels &k, const char *what, Product run, const Case &c, const Inputs &in,
             const std::vector<double> &x, Bound bound) {
    Array<float> y(in.tokens * c.shape.rows);
    for (int64_t i = 0; i < y.count; i++) y[i] = NAN;
    const Weight w = c.weight();
    const int64_t middle = c.shape.rows / 2;
    expect(k.name, what, run(w, in, middle, c.shape.rows, y.data), DONE);
    if (middle > 0) expect(k.name, what, run(w, in, 0, middle, y.data), DONE);
    check_without_memory(k.name, what, [&] { return run(w, in, 0, c.shape.rows, y.data); });
    for (int64_t t = 0; t < in.tokens; t++)
        for (int64_t row = 0; row < c.shape.rows; row++) {
            const double *a = c.values.data() + row * c.shape.columns, *b = x.data() + t * in.stride;
            double want = 0, sum = 0;
            for (int64_t i = 0; i < c.shape.columns; i++) want += a[i] * b[i], sum += std::fabs(a[i] * b[i]);
            const double got = y[t * c.shape.rows + row], most = bound(row, b, sum);
            if (!(std::fabs(got - want) <= most)) fail(k.name, what, c, in.tokens, t, row, got, want, most);
        }
}

// Inputs in natural order, zero behind the columns, as bfloat16 so that all arithmetics read the same numbers.
struct Natural {
    int64_t tokens, stride;
    std::vector<uint16_t> half;
    std::vector<float> values;
    Natural(int64_t tokens, int64_t columns) : tokens(tokens), stride(divide(columns, CHUNK) * CHUNK) {
        for (int64_t i = 0; i < tokens * stride; i++) {
            const uint32_t bits = (random_bits() & 0x807f) | (0x3f00 + (random_bits() % 3 << 7)); // +-0.5 to 4
            half.push_back(i % stride < columns ? static_cast<uint16_t>(bits) : 0);
            values.push_back(static_cast<float>(bf16_value(half.back())));
        }
    }
};

void check_exact(const Kernels &k, const Case &c, const Natural &n) {
    Array<float> x(n.tokens * n.stride);
    for (int64_t t = 0; t < n.tokens; t++)
        k.permute_exact(n.values.data() + t * n.stride, x.data + t * n.stride, n.stride, c.shape.bits);
    const Inputs in = {x.data, nullptr, nullptr, nullptr, nullptr, n.tokens, n.stride};
    const std::vector<double> wide(n.values.begin(), n.values.end());
    compare(k, "exact", k.exact, c, in, wide, [](int64_t, const double *, double sum) { return 1e-5 * sum; });
}

void check_int8(const Candidate &candidate, const Case &c, const Natural &n) {
    const Kernels &k = *candidate.kernels;
    const int64_t chunks = n.stride / CHUNK;
    Array<int8_t> q(n.tokens * n.stride);
    Array<float> steps(n.tokens * chunks), sums(n.tokens * c.groups);
    std::vector<int8_t> natural(static_cast<size_t>(n.stride));
    std::vector<double> rounded(static_cast<size_t>(n.tokens * n.stride));
    for (int64_t t = 0; t < n.tokens; t++) {
        const float *x = n.values.data() + t * n.stride;
        for (int64_t i = 0; i < chunks; i++) {
            float largest = 0;
            for (int64_t j = 0; j < CHUNK; j++) largest = std::fmax(largest, std::fabs(x[i * CHUNK + j]));
            steps[t * chunks + i] = largest / 127;
        }
        for (int64_t g = 0; g < c.groups; g++) sums[t * c.groups + g] = 0;
        for (int64_t i = 0; i < n.stride; i++) {
            const float step = steps[t * chunks + i / CHUNK];
            const int8_t code = natural[static_cast<size_t>(i)] = static_cast<int8_t>(std::nearbyint(x[i] / step));
            const double value = rounded[static_cast<size_t>(t * n.stride + i)] = double(code) * step;
            if (i < c.shape.columns) sums[t * c.groups + i / c.group] += static_cast<float>(value);
        }
        k.permute_int8(natural.data(), q.data + t * n.stride, n.stride, c.shape.bits);
    }
    const Inputs in = {nullptr, q.data, steps.data, sums.data, nullptr, n.tokens, n.stride};
    double largest = 0;
    for (int i = 0; i < 1 << c.shape.bits; i++) largest = std::fmax(largest, std::fabs(c.book[i]));
    const bool zeros = c.shape.sides == ZEROS;
    compare(k, "int8", k.int8, c, in, rounded, [&](int64_t row, const double *x, double sum) {
        double bound = 1e-6 * sum + 1e-30; // scales of zero
        for (int64_t i = 0; i < c.shape.columns; i++) {
            const double scale = c.larger[static_cast<size_t>(row * c.groups + i / c.group)];
            const double step = zeros ? scale : scale * largest / candidate.levels;
            bound += ((zeros ? 0 : candidate.error) + 1e-3) * step * std::fabs(x[i]);
        }
        return bound;
    });
}

void check_bf16(const Kernels &k, const Case &c, const Natural &n) {
    Array<uint16_t> half(divide(n.tokens, 16) * 16 * n.stride);
    k.pack_bf16(n.half.data(), half.data, n.tokens, n.stride);
    const Inputs in = {nullptr, nullptr, nullptr, nullptr, half.data, n.tokens, n.stride};
    const std::vector<double> wide(n.values.begin(), n.values.end());
    compare(k, "bf16", k.bf16, c, in, wide, [](int64_t, const double *, double sum) { return sum / 256; });
}

void check_dequantize(const Kernels &k, const Case &c) {
    const int64_t first = c.shape.rows / 3, columns = c.shape.columns;
    Array<float> out((c.shape.rows - first) * columns);
    for (int64_t i = 0; i < out.count; i++) out[i] = NAN;
    check_without_memory(k.name, "dequantize", [&] { return k.dequantize(c.weight(), first, c.shape.rows, out.data); });
    for (int64_t i = 0; i < out.count; i++) {
        const int64_t row = first + i / columns, at = row * c.groups + i % columns / c.group;
        const size_t g = static_cast<size_t>(at);
        const double want = c.values[static_cast<size_t>(first * columns + i)];
        // zero * scale may have been rounded on its own
        const double bound = 1e-6 * (std::fabs(want) + (c.shape.sides == ZEROS ? c.zero[g] * c.larger[g] : 0));
        if (!(std::fabs(out[i] - want) <= bound))
            fail(k.name, "dequantize", c, 0, i % columns, row, out[i], want, bound);
    }
}

// Values that are exact in every kind, rounding to even, what does not fit, NaN; an odd count.
void check_conversions(const Kernels &k) {
    const float in[] = {0,         -0.0f,     1,         -2.5f,     1.00390625f, 1.01171875f, 1.00048828125f,
                        1.0014648f, 65504,    1e6f,      -INFINITY, NAN,         3e-5f,       6e-8f,
                        3.3895e38f, 1e-39f,   0.333333f, -7,        100,         0.125f,      9};
    constexpr int64_t COUNT = sizeof in / sizeof *in;
    for (const Kind kind : {FLOAT32, FLOAT16, BFLOAT16}) {
        const int64_t size = kind == FLOAT32 ? 4 : 2;
        Array<uint8_t> stored(COUNT * size);
        Array<float> out(COUNT);
        k.from_float(in, stored.data, kind, COUNT);
        k.to_float(stored.data, kind, out.data, COUNT);
        for (int64_t i = 0; i < COUNT; i++) {
            double want = in[i];
            if (kind != FLOAT32 && std::isfinite(in[i]) && in[i] != 0) { // to the nearest multiple of the last place
                const int digits = kind == FLOAT16 ? 11 : 8, lowest = kind == FLOAT16 ? -24 : -133;
                int exponent;
                std::frexp(in[i], &exponent);
                const int place = exponent - digits < lowest ? lowest : exponent - digits;
                want = std::ldexp(std::nearbyint(std::ldexp(double(in[i]), -place)), place);
                if (std::fabs(want) >= std::ldexp(1, kind == FLOAT16 ? 16 : 128)) want = std::copysign(INFINITY, want);
            }
            const bool same = out[i] == want && std::signbit(out[i]) == std::signbit(want);
            if (std::isnan(want) ? std::isnan(out[i]) : same) continue;
            printf("%s conversion to kind %d: %.9g became %.9g, not %.9g\n", k.name, kind, in[i], out[i], want);
            exit(1);
        }
    }
}

void check_case(const Candidate &candidate, const Case &c, const std::vector<int64_t> &tokens) {
    const Kernels &k = *candidate.kernels;
    check_dequantize(k, c);
    for (const int64_t t : tokens) {
        const Natural n(t, c.shape.columns);
        check_exact(k, c, n);
        if (t <= k.most_tokens) check_int8(candidate, c, n);
        if (k.bf16 != nullptr) check_bf16(k, c, n);
    }
}

void check_table(const Candidate &candidate) {
    check_conversions(*candidate.kernels);
    static const int64_t TOKENS[] = {1, 2, 3, 5, 6, 7, 16, 33}, ROWS[] = {1, 4, 7, 2, 19, 3, 9, 8, 5, 37};
    int64_t cases = 0;
    for (const int32_t bits : {2, 3, 4})
        for (const int64_t group : {32, 64, 96, 128, 160, 256, -1})
            for (const int64_t columns : {32, 40, 64, 100, 126, 128, 200, 384, 500, 1000})
                for (const Sides sides : {ONE, TWO, ZEROS})
                    for (const Kind kind : {FLOAT32, FLOAT16, BFLOAT16, BYTES}) {
                        if (kind == BFLOAT16 && cases % 4 != 0) continue;
                        const Case c({bits, group, columns, ROWS[cases % 10], sides, kind});
                        check_case(candidate, c, {1, TOKENS[1 + cases % 7]});
                        cases++;
                    }
    // More than the kernels take at once: of inputs, tokens and rows.
    check_case(candidate, Case({4, 96, 2216, 9, TWO, FLOAT16}), {103});
    check_case(candidate, Case({3, -1, 1312, 33, ZEROS, FLOAT32}), {200});
    check_case(candidate, Case({2, 128, 160, 530, TWO, BFLOAT16}), {5, 531});
    printf("%s: %lld weights\n", candidate.kernels->name, static_cast<long long>(cases + 3));
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

int main(int count, char **names) { // names of tables to check; without any, all
    const Candidate candidates[] = {{portable_kernels(), 0, 0}, // no int8
                                    {avx2_kernels(), 63, 1.27},
                                    {avx512_kernels(), 127, 0.5},
                                    {amx_kernels(), 127, 0.5}};
    for (const Candidate &candidate : candidates) {
        if (candidate.kernels == nullptr) continue;
        bool wanted = count == 1;
        for (int i = 1; i < count; i++) wanted = wanted || strcmp(names[i], candidate.kernels->name) == 0;
        if (wanted) check_table(candidate);
    }
    if (count == 1) check_library();
    return 0;
}
