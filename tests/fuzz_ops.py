# SPDX-License-Identifier: MIT
"""Operands that do not fit together, for afpq::linear and afpq::dequantize: refused, or computed right.

    python tests/fuzz_ops.py [COUNT [SEED]]     random operands; set LIBRARY to another build of the native kernels

With a library built with -fsanitize=address and libasan preloaded, a byte read outside of a tensor ends the process
(test_fuzz.py does that).
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from fuzzing import Dice, pick, plain_weight, same
from torch import Tensor

import afpq
from afpq.errors import AfpqError
from afpq.kernels import cpu_library
from afpq.numerics.formats import FORMATS
from afpq.numerics.packing import layout
from afpq.numerics.scheme import Scheme

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int32, torch.int8, torch.bool,
          torch.complex64, torch.float8_e4m3fn)  # fmt: skip
SAID_BY_TORCH = ("afpq::", "Overflow", "parse", "overflow", "meta", "Could not run")
COUNTS = (0, -1, -5, 1, 5, 8, 16, 31, 32, 64, 2**40, 2**62)
Call = dict[str, Any]


def make_call(dice: Dice) -> Call:
    """Operands that fit."""
    rows, columns = pick(dice, (0, 1, 2, 3, 5, 8, 33, 64)), pick(dice, (1, 7, 16, 31, 32, 33, 64, 96, 160, 256))
    format, group = pick(dice, sorted(FORMATS)), pick(dice, (-1, 1, 5, 8, 16, 32, 64, 128))
    scheme = Scheme(FORMATS[format], group, bool(dice(2)), pick(dice, ("float16", "float32", "log8")))
    call: Call = dict.fromkeys(("scales_neg", "zeros", "grid", "bias"))
    for name, (dtype, shape) in layout(scheme, rows, columns).items():
        call[{"scales_pos": "scales", "scale_grid": "grid"}.get(name, name)] = _content(dice, dtype, shape)
    if call["grid"] is not None:
        call["grid"] = torch.tensor([-3.0, 0.02])
    x = _content(dice, pick(dice, DTYPES[:3]), pick(dice, ((columns,), (1, columns), (3, columns), (2, 5, columns))))
    if dice(3) == 0:
        call["bias"] = _content(dice, x.dtype, (rows,))
    call |= {"x": x, "codebook": list(scheme.format.values), "bits": scheme.format.bits, "group_size": group}
    return {**call, "in_features": columns, "dtype": pick(dice, DTYPES[:4])}


def _content(dice: Dice, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(dice(1000))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def spoil(call: Call, dice: Dice) -> Call:
    """One operand of another kind."""
    name = pick(dice, list(call))
    value = call[name]
    if isinstance(value, Tensor):
        call[name] = _other_tensor(value, dice)
    elif value is None and name != "dtype":
        call[name] = _content(dice, pick(dice, DTYPES[:5]), pick(dice, ((2,), (1,), (3, 1), (8, 4))))
    elif name == "codebook":
        call[name] = pick(dice, ([], value[:-1], value * 2, [*value, 9.0], value[::-1], [float("nan")] * len(value)))
    elif name == "dtype":
        call[name] = pick(dice, DTYPES)
    else:
        call[name] = pick(dice, COUNTS)
    return call


def _other_tensor(value: Tensor, dice: Dice) -> Any:
    if value.is_sparse or value.is_meta:
        return value
    kinds = (
        lambda: None,
        lambda: value[:-1] if value.dim() else value,
        lambda: value[..., :-1] if value.dim() else value,
        lambda: torch.cat([value, value]) if value.dim() else value,
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value.reshape(-1)[0] if value.numel() else value,
        lambda: value.mT if value.dim() > 1 else value,
        lambda: torch.stack([value, value], -1)[..., 0],  # not contiguous
        lambda: value[:1].expand(value.shape) if value.numel() else value,  # every row the same memory
        lambda: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape),  # odd address
        lambda: value.to("meta"),
        lambda: value.to(pick(dice, DTYPES)),
        lambda: torch.empty(0, dtype=value.dtype),
        lambda: torch.zeros_like(value),
        lambda: value.to_sparse() if value.dim() and value.is_floating_point() else value,
        lambda: torch._neg_view(value) if value.is_floating_point() else value,
        lambda: value.float().mul(1e30).to(value.dtype) if value.is_floating_point() else value,
        lambda: 3,
    )
    return pick(dice, kinds)()


def judge(call: Call) -> str:
    """How it ended. AssertionError where numbers are wrong; whatever else comes up is a fault too."""
    weight = [call[k] for k in ("qweight", "scales", "scales_neg", "zeros", "grid")]
    book = [call["codebook"], call["bits"], call["group_size"]]
    ends = []
    for op, arguments in (
        ("linear", [call["x"], *weight, call["bias"], *book]),
        ("dequantize", [*weight, *book, call["in_features"], call["dtype"]]),
    ):
        try:
            result = getattr(torch.ops.afpq, op)(*arguments)
        except AfpqError as error:
            assert str(error)
            ends.append("refused")
            continue
        except (RuntimeError, TypeError, NotImplementedError) as error:  # before any code of ours
            assert error.__traceback__ is not None
            said = str(error)
            assert any(part in said for part in SAID_BY_TORCH), said
            ends.append("refused by torch")
            continue
        ends.append(_check(op, call, result))
    return ", ".join(ends)


def _check(op: str, call: Call, result: Tensor) -> str:
    if result.is_meta:
        return "shapes only"
    columns = call["in_features"] if op == "dequantize" else call["x"].shape[-1]
    parts = ("qweight", "scales", "scales_neg", "zeros", "grid")
    tensors = {part: _plain(call[part]) for part in parts if call[part] is not None}
    if "grid" in tensors:
        tensors["scale_grid"] = tensors.pop("grid")
    if "scales_neg" in tensors:
        tensors["scales_pos"] = tensors.pop("scales")
    span = columns if call["group_size"] == -1 else call["group_size"]
    described = (call["codebook"], call["bits"], max(1, min(span, columns)), columns)
    expected = plain_weight(tensors, *described)
    assert result.shape[-1] == (columns if op == "dequantize" else len(expected))
    if op == "dequantize":
        tolerance = 1e-6 if call["dtype"].itemsize > 2 else 1e-3  # the last bit may round otherwise
        assert same(result.float(), expected.to(call["dtype"]).float(), tolerance), "wrong weights"
        return "right"
    x = _plain(call["x"])
    terms = plain_weight({name: t for name, t in tensors.items() if name != "zeros"}, *described)  # that may cancel
    size = x.float().abs().double() @ (expected.abs() + terms.abs()).T.double()
    right = x.double() @ expected.T.double()
    if call["bias"] is not None:
        right, size = right + call["bias"].to(x.dtype).double(), size + call["bias"].double().abs()
    if x.dtype.itemsize < 4:  # numbers that are too small for such a type become zero
        size = size + (1e-4 if x.dtype.itemsize == 2 else 0.05) * (1 + x.float().abs().sum())
    bound = {torch.float32: 2e-5, torch.float64: 1e-6, torch.float8_e4m3fn: 0.2}.get(x.dtype, 2e-2) * size + 1e-30
    if bool(torch.isfinite(right.to(x.dtype).float()).all()) and float(size.max() if size.numel() else 0) < 1e30:
        assert bool(((result.double() - right).abs() <= bound).all()), "wrong outputs"
    return "right"


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.to_dense() if tensor.is_sparse else tensor).resolve_neg().contiguous()


def main(count: int, seed: int) -> None:
    if "LIBRARY" in os.environ:
        cpu_library.LIBRARY = Path(os.environ["LIBRARY"])
    native = cpu_library.native()
    ends: Counter[str] = Counter()
    for index in range(seed, seed + count):
        generator = random.Random(index)
        call = make_call(generator.randrange)
        for _ in range(generator.randrange(3)):
            call = spoil(call, generator.randrange)
        if native is not None and index % 2:
            assert native.select("portable")
        elif native is not None:
            native.select("avx2")
        try:
            ends[judge(call)] += 1
        except BaseException:
            print(f"input {index}: {call}", file=sys.stderr)
            raise
    print(f"{count} inputs, afpq {afpq.__version__}:", *(f"{n} {end};" for end, n in ends.most_common()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
