# SPDX-License-Identifier: MIT
"""Builds the native CPU kernels, a plain shared library loaded by ctypes; all else is in pyproject.toml.

Without a C++ compiler the package installs too, and the reference computes.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi"))]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

# Sources and their flags. One translation unit for each instruction set; only these may use it.
PORTABLE: dict[str, list[str]] = {"csrc/afpq.cpp": [], "csrc/cpu_features.cpp": [], "csrc/portable.cpp": []}
X86 = {
    "csrc/x86/avx2_exact.cpp": AVX2,
    "csrc/x86/avx2_int8.cpp": AVX2,
    "csrc/x86/avx2_dequantize.cpp": AVX2,
    "csrc/x86/avx512_exact.cpp": AVX512,
    "csrc/x86/avx512_int8.cpp": AVX512,
    "csrc/x86/avx512_dequantize.cpp": AVX512,
    "csrc/x86/amx_bf16.cpp": AMX,
}
ARM: dict[str, list[str]] = {}  # kernels of csrc/arm/ go here, and into find_kernels of cpu_features.cpp
# platform.machine() -> what is built in addition to the portable code
FAMILIES = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
SOURCES = PORTABLE | FAMILIES.get(platform.machine(), {})


class BuildNative(build_ext):
    """Compiles each source with its own flags and links them into libafpq_cpu.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        extra = os.environ.get("AFPQ_CXXFLAGS", "").split()
        objects: list[str] = []
        for source, flags in SOURCES.items():
            arguments = COMMON + flags + extra
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=arguments, depends=ext.depends
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=extra, target_lang="c++"
        )


class AnyPython(bdist_wheel):
    """A wheel for all versions of Python: the library does not depend on it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = Extension(
    "afpq.kernels.libafpq_cpu",
    sources=list(SOURCES),
    depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
    language="c++",
    optional=True,
)
setup(
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
