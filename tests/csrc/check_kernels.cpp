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
#include "cases.h"
#include "without_memory.h"

#include <cstdio>

using namespace afpq;

namespace {

struct Candidate {
    const Kernels *kernels;
    double levels, error; // of int8 weights: steps up to the largest one, and how many of them one may be off
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
