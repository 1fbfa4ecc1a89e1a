# SPDX-License-Identifier: MIT
"""How fast one linear layer is on this CPU, beside torch, its int4 kernel, bitsandbytes and ONNX Runtime.

    python bench/linear.py [--quick] [--out linear.json]
    python bench/linear.py --shapes 4096x4096 --tokens 1 16 --formats nf4 nf3 --groups 32 64 128 --threads 2 --rounds 9

Shapes are out x in. All contestants run in this process, in turns and in another order each round, so that noise of
the machine hits all alike; ratios are between the fastest calls. Weights are cold: each contestant has layers enough
to exceed the last cache twice, and goes around them. Every result is compared with the product of the dequantized
weights; who is wrong is left out, and named.

What to know when reading the tables:
- torch's bfloat16 is slow where the processor has no bfloat16 units (AVX2): there, look at float32 and the peers.
- int8 contestants round inputs to 8 bits: ours up to 6 tokens, and MatMulNBits with accuracy_level 4.
- Ours, torch int4pack and ONNX Runtime hold the same int4 codes and scales; groups are equal for all. Bytes are codes,
  scales and zeros as the contestant stores them.
- The bandwidth is that of the fastest reader at hand, measured in the same rounds.

Peers are measured where they are installed: see bench/requirements-peers.txt. (No script here may be called kernels.py:
Transformers imports a package of that name, and would find the script.)
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from afpq.algorithms import quantize_rtn
from afpq.kernels import cpu_library, set_compute
from afpq.model.linear import AfpqLinear
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import pack
from afpq.numerics.scheme import parse_scheme

FORMATS = ["nf4", "nf3", "int4", "int3", "fp4", "nf2"]
SHAPES = ["4096x4096", "11008x4096", "4096x11008"]
TOKENS = [1, 2, 4, 16, 64, 256]
INT8_TOKENS = 6  # that our int8 arithmetic takes; more are exact
BASELINE = "torch bfloat16"
READER = "read"
SETTLE_SECONDS = 0.005  # before a turn, for threads of the one before that still spin
TURN_SECONDS, TURN_CALLS = 0.02, 32
PIECE_BYTES = 8 * 2**20  # read at a time where bandwidth is measured
TOLERANCE = {False: 0.01, True: 0.03}  # int8 inputs? -> ||y - expected|| / ||expected||

Call = Callable[[], Any]


@dataclass
class Contestant:
    """Somebody's layers, all with the same weight: `prepare` turns inputs [tokens, in] into one call for each."""

    name: str
    nbytes: int  # of one layer
    prepare: Callable[[Tensor], list[Call]]
    expected: Tensor | None  # [most tokens, out]
    int8: bool = False
    scheme: str | None = None  # ours

    @property
    def ours(self) -> bool:
        return self.scheme is not None


def cache_bytes() -> int:
    """The last-level cache; 32 MiB where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * 2**20)


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- contestants


def ours(W: Tensor, x: Tensor, name: str, cold: int, dtype: torch.dtype) -> list[Contestant]:
    """AfpqLinear of one scheme: exact, and int8 on the same layers where the native library is there."""
    weight = quantize_rtn(W, parse_scheme(name))
    first = AfpqLinear.from_weight(weight)
    nbytes = sum(buffer.nbytes for buffer in first.buffers())
    layers = [first, *(copy.deepcopy(first) for _ in range(cold // nbytes))]
    expected = x @ weight.dequantize().T

    def prepare(x: Tensor) -> list[Call]:
        return [partial(layer, x.to(dtype)) for layer in layers]

    modes = ["exact"] if cpu_library.native() is None else ["exact", "int8"]
    return [Contestant(f"{name} {mode}", nbytes, prepare, expected, mode == "int8", name) for mode in modes]


def plain(W: Tensor, x: Tensor, dtype: torch.dtype, cold: int) -> Contestant:
    weights = [W.to(dtype, copy=True) for _ in range(1 + cold // (W.numel() * dtype.itemsize))]

    def prepare(x: Tensor) -> list[Call]:
        return [partial(torch_linear, x.to(dtype), weight) for weight in weights]

    return Contestant(f"torch {str(dtype).removeprefix('torch.')}", weights[0].nbytes, prepare, x @ W.T)


def int4pack(weight: QuantizedWeight, x: Tensor, cold: int, dtype: torch.dtype = torch.bfloat16) -> Contestant:
    """torch's kernel: w = (code - 8) * scale + offset; pairs (scale, offset) [groups, out, 2], of the inputs' dtype."""
    scales, group = weight.scales, weight.scheme.group_size
    assert scales.zero is not None
    scale = scales.pos.float()
    pairs = torch.stack([scale, (8 - scales.zero.float()) * scale], -1).transpose(0, 1).to(dtype).contiguous()
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    nbytes = codes.nbytes + pairs.nbytes
    layers = [(codes.clone(), pairs.clone()) for _ in range(1 + cold // nbytes)]
    product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def prepare(x: Tensor) -> list[Call]:
        return [partial(product, x.to(dtype), codes, group, pairs) for codes, pairs in layers]

    name = f"torch int4pack {str(dtype).removeprefix('torch.')}"
    return Contestant(name, nbytes, prepare, x @ weight.dequantize().T)


def bitsandbytes(W: Tensor, x: Tensor, dtype: torch.dtype, group: int, cold: int) -> Contestant:
    bnb: Any = import_module("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(W, blocksize=group, quant_type="nf4")
    nbytes = codes.nbytes + state.absmax.nbytes
    layers = []
    for _ in range(1 + cold // nbytes):
        layer = bnb.nn.Linear4bit(W.shape[1], W.shape[0], False, dtype, False, "nf4", device="meta").eval()
        layer.weight = bnb.nn.Params4bit(
            codes.clone(), quant_state=copy.deepcopy(state), blocksize=group, compress_statistics=False,
            quant_type="nf4", module=layer, bnb_quantized=True,
        )  # fmt: skip
        layers.append(layer)
    expected = x @ bnb.functional.dequantize_4bit(codes, state).float().T
    if bnb.functional.has_avx512bf16():
        for layer in layers:  # repacks its weight at the first call
            layer(x[:1].to(dtype))

    def prepare(x: Tensor) -> list[Call]:
        return [partial(layer, x.to(dtype)) for layer in layers]

    name = f"bitsandbytes nf4 {str(dtype).removeprefix('torch.')}"
    return Contestant(name, nbytes, prepare, expected)


def onnx_model(weight: QuantizedWeight, accuracy: int) -> bytes:
    """One MatMulNBits: float32 A [tokens, in] -> Y [tokens, out]."""
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.codes.shape
    group = weight.scheme.group_size
    packed = pack(weight.codes, 4).view(rows, -1, group // 2)
    tensors = {"B": packed, "S": weight.scales.pos.float()}
    if weight.scales.zero is not None:
        tensors["Z"] = pack(weight.scales.zero, 4)
    node = helper.make_node(
        "MatMulNBits", ["A", *tensors], ["Y"], domain="com.microsoft",
        N=rows, K=columns, bits=4, block_size=group, accuracy_level=accuracy,
    )  # fmt: skip
    given = helper.make_tensor_value_info("A", TensorProto.FLOAT, ["tokens", columns])
    result = helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["tokens", rows])
    fixed = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    graph = helper.make_graph([node], "linear", [given], [result], fixed)
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=sets, ir_version=8).SerializeToString()
    return model


def onnxruntime(weight: QuantizedWeight, x: Tensor, accuracy: int, cold: int) -> Contestant:
    ort: Any = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads spin in a call, not after it
    scales = weight.scales.pos.numel() * 4 + (0 if weight.scales.zero is None else weight.scales.zero.numel() // 2)
    nbytes = weight.codes.numel() // 2 + scales
    model = onnx_model(weight, accuracy)
    sessions = [ort.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(1 + cold // nbytes)]
    rows = len(weight.codes)

    def run(session: Any, binding: Any, _x: Tensor, y: Tensor) -> Tensor:  # the binding holds addresses only
        session.run_with_iobinding(binding)
        return y

    def prepare(x: Tensor) -> list[Call]:
        x, y = x.contiguous(), torch.empty(len(x), rows)
        calls: list[Call] = []
        for session in sessions:
            binding = session.io_binding()
            binding.bind_input("A", "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())
            binding.bind_output("Y", "cpu", 0, numpy.float32, list(y.shape), y.data_ptr())
            calls.append(partial(run, session, binding, x, y))
        return calls

    side = "sym" if weight.scales.zero is None else "asym"
    name = f"onnxruntime int4-{side} level {accuracy}"
    return Contestant(name, nbytes, prepare, x @ weight.dequantize().T, int8=accuracy == 4)


def reader(cold: int) -> Contestant:
    """The fastest way at hand to read memory, a piece at a time: the native library's, or else a reduction of torch's.

    Pieces as large as layers: a disturbance then spoils as many of its calls as of others'.
    """
    pieces = torch.ones(2 * cold // 8, dtype=torch.int64).split(PIECE_BYTES // 8)
    nbytes = pieces[0].nbytes
    if cpu_library.native() is not None:
        return Contestant(READER, nbytes, lambda _: [partial(cpu_library.read, piece) for piece in pieces], None)
    ways: list[Callable[[Tensor], Any]] = [
        lambda piece: torch.dot(piece.view(torch.float32), piece.view(torch.float32))
    ]
    ways += [torch.sum, torch.amax, lambda piece: piece.view(torch.float32).sum()]
    best = min(ways, key=lambda way: min(seconds(partial(way, piece)) for piece in pieces))
    return Contestant(READER, nbytes, lambda _: [partial(best, piece) for piece in pieces], None)


def contestants(W: Tensor, x: Tensor, arguments: argparse.Namespace, cold: int) -> Iterator[Contestant]:
    dtype, group = getattr(torch, arguments.dtype), arguments.groups[0]
    floats = (torch.float32, torch.bfloat16)
    yield reader(cold)
    for kind in floats:
        yield plain(W, x, kind, cold)
    asymmetric, symmetric = (quantize_rtn(W, parse_scheme(f"int4-{side}-g{group}")) for side in ("asym", "sym"))
    yield int4pack(asymmetric, x, cold)  # with float32 inputs it is 20 times slower
    if installed("bitsandbytes"):
        for kind in floats:
            yield bitsandbytes(W, x, kind, group, cold)
    if installed("onnxruntime") and installed("onnx"):
        for weight, level in itertools.product((asymmetric, symmetric), (0, 4)):
            yield onnxruntime(weight, x, level, cold)
    for name, side, size in itertools.product(arguments.formats, ("asym", "sym"), arguments.groups):
        yield from ours(W, x, f"{name}-{side}-g{size}", cold, dtype)


# ---- measuring


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def error(contestant: Contestant, call: Call, tokens: int) -> float:
    """||y - expected|| / ||expected||."""
    if contestant.expected is None:
        return 0.0
    expected = contestant.expected[:tokens]
    return float((call().float() - expected).norm() / expected.norm())


def turn(calls: Iterator[Call]) -> list[float]:
    """Times of calls, each of the next layer, for about TURN_SECONDS; the first does not count if others follow."""
    time.sleep(SETTLE_SECONDS)
    times: list[float] = []
    while sum(times) < TURN_SECONDS and len(times) < TURN_CALLS:
        times.append(seconds(next(calls)))
    return times[1:] or times


def measure(field: list[Contestant], x: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Name -> what was measured with these inputs [tokens, in]."""
    results: dict[str, dict[str, Any]] = {}
    running: list[tuple[Contestant, Iterator[Call]]] = []
    for contestant in field:
        if contestant.ours and contestant.int8 and len(x) > INT8_TOKENS:
            continue
        set_compute("int8" if contestant.ours and contestant.int8 else "exact")
        prepared = contestant.prepare(x)
        wrong = error(contestant, prepared[0], len(x))
        results[contestant.name] = {"bytes": contestant.nbytes, "error": wrong, "seconds": []}
        if wrong <= TOLERANCE[contestant.int8]:  # False for NaN too
            running.append((contestant, itertools.cycle(prepared[1:] + prepared[:1])))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(running)
        for contestant, calls in running:
            set_compute("int8" if contestant.ours and contestant.int8 else "exact")
            results[contestant.name]["seconds"] += turn(calls)
    for result in results.values():
        times = result.pop("seconds")
        result["calls"] = len(times)
        if times:
            result |= {"minimum_seconds": min(times), "median_seconds": statistics.median(times)}
    return results


def speeds(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Name -> calls a second, by the fastest call, of those who were right."""
    return {name: 1 / result["minimum_seconds"] for name, result in results.items() if "minimum_seconds" in result}


def compare(field: list[Contestant], results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the second table shows, by name; a ratio is one of speeds, None where there is nobody to compare with."""
    speed = speeds(results)
    rivals = {c.name: speed[c.name] for c in field if not c.ours and c.name in speed and c.name != READER}
    exact = {c.name: rivals[c.name] for c in field if c.name in rivals and not c.int8}
    bandwidth = results[READER]["bytes"] * speed[READER]

    def ratio(name: str, other: str) -> float | None:
        return speed[name] / speed[other] if other in speed and other != name else None

    rows: dict[str, dict[str, Any]] = {}
    for contestant in field:
        name = contestant.name
        if name not in speed or name == READER:
            continue
        rows[name] = {
            "bandwidth_share": contestant.nbytes * speed[name] / bandwidth,
            "to_fastest_peer": speed[name] / max(rivals.values()),
            "to_fastest_float_peer": speed[name] / max(exact.values()),
        }
        if contestant.scheme is not None:
            book = contestant.scheme.split("-")[0]
            rows[name]["asym_to_sym"] = ratio(name, name.replace("-asym-", "-sym-"))
            four = name.replace("3-", "4-", 1) if book.endswith("3") else name
            rows[name]["three_to_four_bits"] = ratio(name, four)
    return rows


# ---- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def speed_table(field: list[Contestant], cells: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Rows: contestants, columns: tokens, entries: speed in units of BASELINE's."""
    rows = []
    by_tokens = {tokens: speeds(results) for tokens, results in cells.items()}
    for contestant in field:
        name = contestant.name
        if name == READER:
            continue
        row = [speed[name] / speed[BASELINE] if name in speed else None for speed in by_tokens.values()]
        rows.append([name, *map(shown, row)])
    return table(["", *(f"{tokens} tokens" for tokens in cells)], rows)


def compare_table(rows: dict[str, dict[str, Any]]) -> str:
    head = ["", "of read bandwidth", "asym / sym", "3 / 4 bits", "/ fastest peer", "/ fastest float peer"]
    keys = ["asym_to_sym", "three_to_four_bits", "to_fastest_peer", "to_fastest_float_peer"]
    body = [
        [name, f"{100 * row['bandwidth_share']:.0f} %", *(shown(row.get(key)) for key in keys)]
        for name, row in rows.items()
    ]
    return table(head, body)


def machine(cold: int) -> dict[str, Any]:
    native = cpu_library.native()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].split(":")[1].strip() if models else platform.machine(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "afpq_isa": None if native is None else native.isa,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cold_bytes": cold,
        "versions": {name: installed(name) for name in ("torch", "bitsandbytes", "onnxruntime")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--groups", type=int, nargs="+", default=[128], help="peers take the first")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of inputs to ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cold-mib", type=int, help="weights of a contestant; default 128, or twice the last cache")
    parser.add_argument("--quick", action="store_true", help="one shape, 1, 4, 16 tokens, nf4, nf3, int4, 5 rounds")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.tokens, arguments.rounds = SHAPES[:1], [1, 4, 16], 5
        arguments.formats = ["nf4", "nf3", "int4"]
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for bitsandbytes, before it is loaded
        torch.set_num_threads(arguments.threads)
    cold = arguments.cold_mib * 2**20 if arguments.cold_mib else max(128 * 2**20, 2 * cache_bytes())
    report: dict[str, Any] = {"machine": machine(cold), "shapes": []}
    print(f"{report['machine']}\n", flush=True)
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        torch.manual_seed(0)
        W, x = torch.randn(rows, columns) * 0.02, torch.randn(max(arguments.tokens), columns)
        field = list(contestants(W, x, arguments, cold))
        del W
        cells = {}
        for tokens in arguments.tokens:
            print(f"{shape}, {tokens} tokens", file=sys.stderr, flush=True)
            cells[tokens] = measure(field, x[:tokens], arguments.rounds)
        few = min(cells)
        summary = compare(field, cells[few])
        bandwidth = cells[few][READER]["bytes"] / cells[few][READER]["minimum_seconds"]
        wrong = sorted({name for results in cells.values() for name in results if not results[name]["calls"]})
        print(f"### {shape}: speed, {BASELINE} = 1\n\n{speed_table(field, cells)}\n")
        print(f"### {shape}, {few} tokens: {bandwidth / 1e9:.1f} GB/s can be read\n\n{compare_table(summary)}\n")
        if wrong:
            print(f"Wrong results, not measured: {', '.join(wrong)}\n")
        sys.stdout.flush()
        report["shapes"].append({
            "shape": shape, "bandwidth": bandwidth, "wrong": wrong, "few_tokens": summary,
            "cells": [{"tokens": tokens, **results} for tokens, results in cells.items()],
        })  # fmt: skip
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        del field


if __name__ == "__main__":
    with torch.inference_mode():
        main()
