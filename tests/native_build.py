# SPDX-License-Identifier: MIT
"""The compiler of the native kernels, and the flags of those for AVX2."""

from __future__ import annotations

import shutil

COMPILER = shutil.which("g++")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
