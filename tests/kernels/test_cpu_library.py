# SPDX-License-Identifier: MIT
"""The native library is found, checked and driven; without it the reference computes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.errors import AfpqError
from afpq.kernels import cpu_library
from afpq.kernels.cpu_library import NativeLibrary, Weight, check_error, describe, native
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.scheme import Scheme, parse_scheme


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Tests change the instruction set of the process."""
    library = native()
    if library is None:
        pytest.skip("the native library is not built")
    isa = library.isa
    yield
    library.select(isa)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(scheme: Scheme, rows: int, columns: int) -> AfpqLinear:
    return AfpqLinear.from_weight(quantize_rtn(random(rows, columns), scheme))


FORK = """
import os, torch, warnings
from afpq.algorithms import quantize_rtn
from afpq.model.linear import AfpqLinear
from afpq.numerics.scheme import parse_scheme
torch.set_num_threads(4)
layer = AfpqLinear.from_weight(quantize_rtn(torch.randn(2048, 1024), parse_scheme("nf4-asym-g128")))
x = torch.randn(2, 1024)
wanted = layer(x)
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(layer(x), wanted) else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_a_forked_child_computes_too() -> None:
    assert run(FORK, OMP_NUM_THREADS="4").returncode == 0


def test_the_environment_forces_an_instruction_set() -> None:
    say = "from afpq.kernels.cpu_library import native; print(native().isa)"
    assert run(say, AFPQ_ISA="portable").stdout == "portable\n"
    wrong = run(say, AFPQ_ISA="mmx")
    assert wrong.returncode != 0 and "AFPQ_ISA=mmx" in wrong.stderr


def test_without_the_library_the_reference_computes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer, x = layer_of(parse_scheme("nf4-asym-g32"), 8, 64), random(2, 64)
    wanted = layer(x)
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "none.so")
    native.cache_clear()
    try:
        with pytest.warns(UserWarning, match="not built"):
            result = layer(x)
        torch.testing.assert_close(result, wanted)
        layer(x)  # a second warning would be an error here
        native.cache_clear()
        (tmp_path / "none.so").write_bytes(b"no library")
        with pytest.warns(UserWarning, match="cannot be loaded"):
            layer(x)
    finally:
        native.cache_clear()


def test_a_kernel_that_computes_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = native()
    assert library is not None
    if not library.select("avx2"):
        pytest.skip("avx2 cannot run here")
    assert library._agrees_with_portable() and library.isa == "avx2"
    real = library.library.afpq_linear

    def broken(*arguments: object) -> int:
        error = real(*arguments)
        if library.isa == "avx2":
            (ctypes.c_float * 16).from_address(arguments[-2])[5] *= 1.5  # type: ignore[arg-type]
        return int(error)

    both = {"afpq_linear": staticmethod(broken), "afpq_select": library.library.afpq_select}
    monkeypatch.setattr(library, "library", type("Library", (), both))
    with pytest.warns(UserWarning, match="wrong results"):
        assert not library._agrees_with_portable()


def test_a_weight_is_described_as_the_library_reads_it() -> None:
    """Every field holds what its name in csrc/afpq.h states."""
    library = native()
    assert library is not None and library.library.afpq_weight_bytes() == ctypes.sizeof(Weight)
    layer = layer_of(parse_scheme("nf3-asym-g32-log8"), 8, 100)
    packed = Packed.from_tensors(layer.packed(), layer.scheme)
    weight = describe(packed, 100)
    assert weight is not None and packed.scales_neg is not None and packed.grid is not None
    addresses = [packed.qweight, packed.scales, packed.scales_neg, None, packed.grid]
    found = [getattr(weight, name) for name in ("codes", "pos", "neg", "zeros", "grid")]
    assert found == [None if t is None else t.data_ptr() for t in addresses]
    assert weight.book[:8] == torch.tensor(layer.scheme.format.values).tolist()
    sizes = ("rows", "columns", "group", "groups", "row_bytes", "zero_bytes", "bits", "scale_kind")
    assert [getattr(weight, name) for name in sizes] == [8, 100, 32, 4, 39, 0, 3, 3]
    assert weight.levels is None and weight.end is None
    assert describe(packed._replace(scales=packed.scales.mT.contiguous().mT), 100) is None


def test_errors_of_the_library_have_names() -> None:
    library = native()
    assert library is not None
    layer = layer_of(parse_scheme("nf4-asym-g32"), 8, 64)
    weight = describe(Packed.from_tensors(layer.packed(), layer.scheme), 64)
    assert weight is not None
    x, y = random(1, 64), torch.empty(1, 8)
    check_error(library.library.afpq_linear(weight, x.data_ptr(), 0, 1, None, y.data_ptr(), 0))
    for change in ({"bits": 5}, {"bits": 1}, {"scale_kind": 4}, {"scale_kind": 3}):  # bytes, and no grid
        wrong = Weight.from_buffer_copy(weight)
        for name, value in change.items():
            setattr(wrong, name, value)
        with pytest.raises(AfpqError, match="native kernel: bad argument"):
            check_error(library.library.afpq_linear(wrong, x.data_ptr(), 0, 1, None, y.data_ptr(), 0))
        with pytest.raises(AfpqError, match="native kernel: bad argument"):
            check_error(library.library.afpq_dequantize(wrong, 0, 8, 0, y.data_ptr()))
    with pytest.raises(AfpqError, match="native kernel: out of memory"):
        check_error(1)


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ctypes.Structure):
        _fields_ = [*Weight._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setattr(cpu_library, "Weight", Other)
    with pytest.raises(OSError, match="build it again"):
        NativeLibrary()


def test_torch_without_its_function_for_threads_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.10: one thread, and the user can see why."""
    layer, before = layer_of(parse_scheme("nf4-asym-g32"), 8, 64), torch.get_num_threads()
    wanted = layer(random(2, 64))
    monkeypatch.setattr(cpu_library, "_torch_parallel_for", lambda: None)
    try:
        torch.set_num_threads(1)
        NativeLibrary()  # a warning would be an error here: one thread is what was chosen
        torch.set_num_threads(3)
        native.cache_clear()
        with pytest.warns(UserWarning, match="one thread of 3; install torch 2.10"):
            assert torch.equal(layer(random(2, 64)), wanted)
        layer(random(2, 64))  # once
    finally:
        torch.set_num_threads(before)
        monkeypatch.undo()
        native.cache_clear()
        assert native() is not None  # hands torch's threads over again
