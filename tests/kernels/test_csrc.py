# SPDX-License-Identifier: MIT
"""The kernels' own C++ test under AddressSanitizer and UBSan; AVX-512 and AMX run on loops in place of intrinsics."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from native_build import AVX2, COMPILER

ROOT = Path(__file__).parents[2]
COMMON = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    f"-I{ROOT}/csrc",
    f"-I{ROOT}/tests/csrc",
]
CHECKED = [*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATED = [*AVX2, "-DAFPQ_EMULATE"]
FILES = {
    "csrc/afpq.cpp": [],
    "csrc/cpu_features.cpp": [],
    "csrc/portable.cpp": [],
    "csrc/x86/avx2_exact.cpp": AVX2,
    "csrc/x86/avx2_int8.cpp": AVX2,
    "csrc/x86/avx2_dequantize.cpp": AVX2,
    "csrc/x86/avx512_exact.cpp": EMULATED,
    "csrc/x86/avx512_int8.cpp": EMULATED,
    "csrc/x86/avx512_dequantize.cpp": EMULATED,
    "csrc/x86/amx_bf16.cpp": EMULATED,
    "tests/csrc/check_kernels.cpp": [],
}
WITHOUT_MEMORY = "-Wl,--wrap=aligned_alloc"  # check_kernels.cpp decides which allocation fails

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 processor"),
]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_table_of_kernels_with_sanitizers(tmp_path: Path) -> None:
    objects = []
    for file, flags in FILES.items():
        objects.append(str(tmp_path / (Path(file).stem + ".o")))
        run(str(COMPILER), *CHECKED, *flags, "-c", str(ROOT / file), "-o", objects[-1])
    run(str(COMPILER), *CHECKED, *objects, WITHOUT_MEMORY, "-o", str(tmp_path / "check"))
    printed = run(str(tmp_path / "check"))
    names = ["portable", "avx2", "avx512", "amx", "library"]
    assert [line.split()[0].rstrip(":") for line in printed.splitlines()] == names


def test_every_file_compiles_for_its_instruction_set(tmp_path: Path) -> None:
    """Without a warning, with the flags the package is built with."""
    source = (ROOT / "setup.py").read_text()
    built: dict[str, Any] = {"platform": platform}
    exec(source[source.index("COMMON = ") : source.index("class BuildNative")], built)  # not the call of setup()
    families: dict[str, dict[str, list[str]]] = built["FAMILIES"]
    assert built["SOURCES"] == built["PORTABLE"] | families["x86_64"]
    files = built["PORTABLE"].keys() | {file for family in families.values() for file in family}
    assert files == {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")}
    for file, flags in built["SOURCES"].items():
        command = [*built["COMMON"], "-O1", "-Werror", *flags, "-c", str(ROOT / file), "-o", str(tmp_path / "o")]
        run(str(COMPILER), *command)


def test_only_the_family_s_own_sources_are_needed(tmp_path: Path) -> None:
    """The portable sources compile without flags for another processor, if there is a compiler for one."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for another processor")
    for file in ("afpq", "cpu_features", "portable"):
        run(compiler, *COMMON, "-c", str(ROOT / f"csrc/{file}.cpp"), "-o", str(tmp_path / "o"))
