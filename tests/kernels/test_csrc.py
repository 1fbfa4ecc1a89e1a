# SPDX-License-Identifier: MIT
"""The kernels' own C++ test under AddressSanitizer and UBSan; AVX-512 and AMX run on loops in place of intrinsics."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

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
FILES = {
    "csrc/portable.cpp": [],
    "csrc/x86/avx2_exact.cpp": AVX2,
    "csrc/x86/avx2_int8.cpp": AVX2,
    "csrc/x86/avx512.cpp": [*AVX2, "-DAFPQ_EMULATE"],
    "csrc/x86/amx_bf16.cpp": [*AVX2, "-DAFPQ_EMULATE"],
    "tests/csrc/check_kernels.cpp": [],
}

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
    run(str(COMPILER), *CHECKED, *objects, "-o", str(tmp_path / "check"))
    said = run(str(tmp_path / "check"))
    assert [line.split()[0].rstrip(":") for line in said.splitlines()] == ["portable", "avx2", "avx512", "amx"]


def test_every_file_compiles_for_its_instruction_set(tmp_path: Path) -> None:
    """Without a warning, with the flags the package is built with."""
    source = (ROOT / "setup.py").read_text()
    built: dict[str, object] = {}
    exec(source[source.index("COMMON = ") : source.index("class BuildNative")], built)  # not the call of setup()
    files = built["SOURCES"]
    assert isinstance(files, dict) and set(files) == {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")}
    for file, flags in files.items():
        run(
            str(COMPILER), *built["COMMON"], "-O1", "-Werror", *flags, "-c", str(ROOT / file), "-o", str(tmp_path / "o")
        )  # type: ignore[misc]
