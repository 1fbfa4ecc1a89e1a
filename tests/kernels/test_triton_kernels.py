# SPDX-License-Identifier: MIT
"""The device code: dtypes in and out of the interpreter, and what it compiles to. `test_gpu.py` checks its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from afpq.kernels import triton_kernels  # noqa: E402


def test_only_the_interpreter_computes_bfloat16_in_float32() -> None:
    interpreted = triton_kernels.INTERPRETED
    assert triton_kernels.product_dtype(torch.float16) == triton.language.float16
    assert triton_kernels.result_dtype(torch.float16) == torch.float16
    assert (triton_kernels.product_dtype(torch.bfloat16) == triton.language.bfloat16) != interpreted
    assert (triton_kernels.result_dtype(torch.bfloat16) == torch.bfloat16) != interpreted
    assert triton_kernels.PORTABLE or not interpreted  # it has no assembly


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_code_keeps_its_budget_without_a_gpu() -> None:
    """Every tile and kind of scheme compiles; instructions, spills and shared memory are within bounds."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "bench" / "gpu_code.py"
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("| ok |") == 3 * 5 * 3 * 4  # GPUs, tokens, bits, kinds
