// SPDX-License-Identifier: MIT
// What this processor and this operating system can run: CPUID reports the first, XCR0 which registers are saved.
#include "afpq.h"

#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace afpq {
namespace {

#if defined(__x86_64__)

struct Features {
    bool avx2, avx512, amx;
};

uint64_t saved_registers() { // XCR0
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

bool all(uint32_t word, std::initializer_list<int> bits) {
    for (int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}

bool allow_tiles() { // Linux hands tile registers out on request only
#if defined(__linux__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

Features detect() {
    Features f = {};
    uint32_t a, b, c, d, b7, c7, d7, a71 = 0;
    constexpr int FMA = 12, OSXSAVE = 27, F16C = 29;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, {FMA, OSXSAVE, F16C})) return f;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return f;
    if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    const uint64_t saved = saved_registers();
    const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
    constexpr int AVX2 = 5, AVX512F = 16, AVX512DQ = 17, AVX512BW = 30, AVX512VL = 31;
    constexpr int VBMI = 1, VNNI = 11, AMX_BF16 = 22, AMX_TILE = 24, AVX512_BF16 = 5;
    f.avx2 = ymm && all(b7, {AVX2});
    f.avx512 = f.avx2 && zmm && all(b7, {AVX512F, AVX512DQ, AVX512BW, AVX512VL}) && all(c7, {VBMI, VNNI});
    f.amx = f.avx512 && tiles && all(d7, {AMX_BF16, AMX_TILE}) && all(a71, {AVX512_BF16}) && allow_tiles();
    return f;
}

#endif

} // namespace

const Kernels *find_kernels(const char *name) {
    if (strcmp(name, "portable") == 0) return portable_kernels();
#if defined(__x86_64__)
    static const Features here = detect();
    if (strcmp(name, "avx2") == 0 && here.avx2) return avx2_kernels();
    if (strcmp(name, "avx512") == 0 && here.avx512) return avx512_kernels();
    if (strcmp(name, "amx") == 0 && here.amx) return amx_kernels();
#endif
    return nullptr;
}

} // namespace afpq
