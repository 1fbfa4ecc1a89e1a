// SPDX-License-Identifier: MIT
// The AMX intrinsics of csrc/x86/amx_bf16.cpp as plain loops; the end of emulated.h.
#pragma once

// Without optimization, <immintrin.h> has macros for what needs a constant.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

namespace afpq {
namespace {

// ---- tiles: 8 of up to 16 rows of 64 bytes, as the 64 bytes of a configuration say

struct EmulatedTiles {
    uint8_t config[64];
    uint32_t words[8][16][16];
    int rows(int tile) const { return config[48 + tile]; }
    int row_bytes(int tile) const { return config[16 + 2 * tile] | config[17 + 2 * tile] << 8; }
    void check(int tile) const {
        emulated_check(config[0] == 1, "tile without a configuration");
        emulated_check(tile >= 0 && tile < 8 && rows(tile) > 0 && row_bytes(tile) > 0, "tile not configured");
    }
};
thread_local EmulatedTiles emulated_tiles;

inline void _tile_loadconfig(const void *config) {
    const uint8_t *bytes = static_cast<const uint8_t *>(config);
    memset(&emulated_tiles, 0, sizeof emulated_tiles);
    memcpy(emulated_tiles.config, bytes, 64);
    emulated_check(bytes[0] == 1 && bytes[1] == 0, "palette 1, first row 0");
    for (int i = 2; i < 64; i++) // reserved bytes, and tiles beyond the eighth
        if (i < 16 || (i >= 32 && i < 48) || i >= 56) emulated_check(bytes[i] == 0, "reserved byte of a configuration");
    for (int t = 0; t < 8; t++)
        emulated_check(emulated_tiles.rows(t) <= 16 && emulated_tiles.row_bytes(t) <= 64, "size of a tile");
}
inline void _tile_release() { memset(&emulated_tiles, 0, sizeof emulated_tiles); }
inline void _tile_zero(int tile) {
    emulated_tiles.check(tile);
    memset(emulated_tiles.words[tile], 0, sizeof emulated_tiles.words[tile]);
}
inline void _tile_loadd(int tile, const void *from, int64_t stride) {
    _tile_zero(tile); // rows and bytes beyond the configured ones
    for (int r = 0; r < emulated_tiles.rows(tile); r++)
        memcpy(emulated_tiles.words[tile][r], static_cast<const char *>(from) + r * stride,
               static_cast<size_t>(emulated_tiles.row_bytes(tile)));
}
inline void _tile_stored(int tile, void *to, int64_t stride) {
    emulated_tiles.check(tile);
    for (int r = 0; r < emulated_tiles.rows(tile); r++)
        memcpy(static_cast<char *>(to) + r * stride, emulated_tiles.words[tile][r],
               static_cast<size_t>(emulated_tiles.row_bytes(tile)));
}
// c[m, n] += sum over k of a[m, 2 k] * b[k, 2 n] + a[m, 2 k + 1] * b[k, 2 n + 1]; subnormal numbers count as zero, sums too.
inline void _tile_dpbf16ps(int c, int a, int b) {
    EmulatedTiles &t = emulated_tiles;
    t.check(c), t.check(a), t.check(b);
    emulated_check(c != a && c != b && a != b, "tiles of a product differ");
    emulated_check(t.rows(c) == t.rows(a) && t.row_bytes(c) == t.row_bytes(b) && t.row_bytes(a) == 4 * t.rows(b),
                   "sizes of a product's tiles");
    const auto value = [](uint32_t bits) {
        if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    };
    for (int m = 0; m < t.rows(c); m++) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < t.rows(b); k++) {
            const float a0 = value(t.words[a][m][k] << 16), a1 = value(t.words[a][m][k] & 0xffff0000);
            for (int n = 0; n < t.row_bytes(c) / 4; n++) {
                even[n] = std::fma(a0, value(t.words[b][k][n] << 16), even[n]);
                odd[n] = std::fma(a1, value(t.words[b][k][n] & 0xffff0000), odd[n]);
            }
        }
        for (int n = 0; n < t.row_bytes(c) / 4; n++) {
            const float sum = value(t.words[c][m][n]) + (even[n] + odd[n]);
            uint32_t bits;
            memcpy(&bits, &sum, 4);
            const float flushed = value(bits);
            memcpy(&t.words[c][m][n], &flushed, 4);
        }
    }
}

} // namespace
} // namespace afpq
