# SPDX-License-Identifier: MIT
"""Builds the native CPU kernels, a plain shared library loaded by ctypes; all else is in pyproject.toml.

Without a C++ compiler the package installs all the same and runs on the reference.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-g0", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "vbmi"))]
AMX = [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]

# One translation unit for each instruction set; only these may use it.
SOURCES: dict[str, list[str]] = {
    "csrc/afpq.cpp": [],
    "csrc/cpu_features.cpp": [],
    "csrc/portable.cpp": [],
    "csrc/x86/avx2_exact.cpp": AVX2,
    "csrc/x86/avx2_int8.cpp": AVX2,
    "csrc/x86/avx512.cpp": AVX512,
    "csrc/x86/amx_bf16.cpp": AMX,
}


class BuildNative(build_ext):
    """Compiles each source with its own flags and links them into libafpq_cpu.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        extra = os.environ.get("AFPQ_CXXFLAGS", "").split()
        x86 = platform.machine() in ("x86_64", "AMD64")
        objects: list[str] = []
        for source, flags in SOURCES.items():
            arguments = COMMON + (flags if x86 else []) + extra
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=arguments, depends=ext.depends
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=extra, target_lang="c++"
        )


class AnyPython(bdist_wheel):
    """The library knows no Python: one wheel for all versions of it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


native = Extension(
    "afpq.kernels.libafpq_cpu",
    sources=list(SOURCES),
    depends=["csrc/afpq.h", "csrc/x86/avx2.h", "csrc/x86/f16c.h"],
    language="c++",
    optional=True,
)
setup(
    ext_modules=[] if sys.platform == "win32" else [native],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
