// SPDX-License-Identifier: MIT
// Random packed weights with the float64 values that they stand for, read from the bit stream by code of its own.
#pragma once

#include "afpq.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using namespace afpq;

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

} // namespace
