# SPDX-License-Identifier: MIT
"""How fast one linear layer is on an NVIDIA GPU, beside torch and the 4-bit layers of others.

    python bench/gpu.py [--quick] [--out gpu.json]
    python bench/gpu.py --shapes 8192x8192 --tokens 1 16 --formats nf4 nf3 --groups 64 128 --dtypes float16 bfloat16
    python bench/gpu.py --device cpu    # without a GPU, in Triton's interpreter: shows that it runs, not how fast

Shapes are out x in. All contestants run in this process, in turns and in another order each round; ratios are between
their best times. The calls of a contestant are one CUDA graph, as in a model that is served. Weights are cold: each
contestant has layers enough to exceed the L2 cache eight times, and goes around them; twice would not do, since our
loads ask to be evicted first, so a part of what was there before stays. Results are compared with the float32 product
of the dequantized weights. Who is wrong or cannot run is left out, and named.

Goals, in float16: one token through 8192x8192 in 14 us on an H200, and 28672x8192 at 75 % of the bandwidth of a copy;
2.5 times as fast as torch up to 16 tokens, never more than 5 % slower up to 4096; two scales at 0.9 of the speed of one
or better. AFPQ_AUTOTUNE=1 lets ours measure its tiles; without it they come from a table.

Bytes are codes, scales and zeros as they are stored; a copy's are those it reads and those it writes. torch int4pack,
gemlite and our int4 with zero points hold the same codes and scales. Peers: pip install bitsandbytes torchao gemlite.
"""

from __future__ import annotations

import os
import sys

# Read when Triton is imported, which importing afpq does.
os.environ.setdefault("TRITON_INTERPRET", str(int("cpu" in sys.argv or "--device=cpu" in sys.argv)))

import argparse
import copy
import gc
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from linear import installed, table
from torch import Tensor, nn
from torch.nn.functional import linear as torch_linear

from afpq.algorithms import quantize_rtn
from afpq.kernels import gpu
from afpq.kernels.operands import Packed
from afpq.model.linear import AfpqLinear
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import parse_scheme

SHAPES = ["4096x4096", "8192x8192", "28672x8192"]
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COPY, BASELINE = "copy", "torch float16"
CACHES = 8  # L2 caches that a contestant's weights would fill
REPLAYS = 5  # in a turn, after one that does not count
TOLERANCE = 0.01  # ||y - expected|| / ||expected||
FIGURES = {  # what is printed, and how
    "microseconds": ("microseconds", ".1f"),
    "median_microseconds": ("median microseconds", ".1f"),
    "to_float16": (f"speed, {BASELINE} = 1", ".2f"),
    "gigabytes_a_second": ("GB/s of weights, and of the copy", ".0f"),
    "of_copy": ("of the bandwidth of a copy", ".0%"),
    "asym_to_sym": ("speed, one scale = 1", ".2f"),
    "error": ("relative error", ".1e"),
}

Call = Callable[[Tensor], Tensor]
Results = dict[str, dict[str, Any]]  # by name


@dataclass
class Contestant:
    """Somebody's layers, all with the same weight; a call turns inputs [tokens, in] into outputs."""

    name: str
    calls: list[Call]  # one for each layer
    nbytes: int  # of one layer
    dtype: str  # of inputs
    weight: Callable[[], Tensor] | None  # float32 [out, in], dequantized when asked for; None: results are not checked


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


# ---- contestants


def copier(device: torch.device, cold: int) -> list[Contestant]:
    source, target = torch.zeros(2, max(cold, 2**20), dtype=torch.uint8, device=device)
    return [Contestant(COPY, [lambda _: target.copy_(source)], 2 * source.nbytes, "float16", None)]


def plain(W: Tensor, dtype: str, cold: int) -> list[Contestant]:
    weights = [W.to(FLOATS[dtype], copy=True) for _ in range(1 + cold // (2 * W.numel()))]
    calls: list[Call] = [partial(torch_linear, weight=weight) for weight in weights]
    return [Contestant(f"torch {dtype}", calls, weights[0].nbytes, dtype, weights[0].float)]


def ours(W: Tensor, scheme: str, dtypes: list[str], cold: int) -> list[Contestant]:
    """AfpqLinear with inputs of several types. On a CPU, whose kernels the op would take, what it does on GPUs."""
    first = AfpqLinear.from_weight(quantize_rtn(W, parse_scheme(scheme)))
    nbytes = sum(buffer.nbytes for buffer in first.buffers())
    calls: list[Call] = [first, *(copy.deepcopy(first) for _ in range(cold // nbytes))]
    if not W.is_cuda:
        book = first.scheme.format
        weight = Packed(first.qweight, *first._scale_buffers(), list(book.values), book.bits, first.scheme.group_size)
        calls = [lambda x: gpu.linear(x, weight, None)]
    return [Contestant(f"{scheme} {dtype}", calls, nbytes, dtype, first.dequantize) for dtype in dtypes]


def int4pack(weight: QuantizedWeight, cold: int) -> list[Contestant]:
    """torch's kernel: w = (code - 8) * scale + offset; pairs (scale, offset) [groups, out, 2]; bfloat16 only."""
    scale, zero, codes = weight.scales.pos.float(), weight.scales.zero, weight.codes
    pairs = torch.stack([scale, (8 - zero.float()) * scale], -1).transpose(0, 1).bfloat16().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    nbytes, product = packed.nbytes + pairs.nbytes, torch.ops.aten._weight_int4pack_mm
    layers = [(packed.clone(), weight.scheme.group_size, pairs.clone()) for _ in range(1 + cold // nbytes)]
    calls: list[Call] = [lambda x, layer=layer: product(x, *layer) for layer in layers]
    return [Contestant("torch int4pack bfloat16", calls, nbytes, "bfloat16", weight.dequantize)]


def bitsandbytes(W: Tensor, dtype: str, group: int, cold: int) -> list[Contestant]:
    bnb: Any = import_module("bitsandbytes")
    codes, state = bnb.functional.quantize_4bit(W, blocksize=group, quant_type="nf4")
    nbytes = codes.nbytes + state.absmax.nbytes
    layers = [(codes.clone(), copy.deepcopy(state)) for _ in range(1 + cold // nbytes)]
    calls: list[Call] = [partial(bnb.matmul_4bit, B=codes, quant_state=state) for codes, state in layers]
    weight = partial(bnb.functional.dequantize_4bit, codes, state)
    return [Contestant(f"bitsandbytes nf4 {dtype}", calls, nbytes, dtype, lambda: weight().float())]


def torchao(W: Tensor, packing: str, group: int, cold: int) -> list[Contestant]:
    """Its weight is what it makes of the identity, and has to be near W. It takes bfloat16 only."""
    ao: Any = import_module("torchao.quantization")
    config = ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format=packing, set_inductor_config=False)

    def layer() -> Any:
        model = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta"))
        model[0].weight = nn.Parameter(W.bfloat16(), requires_grad=False)
        ao.quantize_(model, config)
        return model[0]

    first = layer()
    nbytes = sum(getattr(first.weight, name).nbytes for name in first.weight.tensor_data_names)
    identity = torch.eye(W.shape[1], dtype=torch.bfloat16, device=W.device)
    assert (first(identity).T - W).norm() < 0.2 * W.norm(), "its weight is far from the float weight"
    calls: list[Call] = [first, *(layer() for _ in range(cold // nbytes))]
    return [Contestant(f"torchao {packing} bfloat16", calls, nbytes, "bfloat16", lambda: first(identity).T.float())]


def gemlite(weight: QuantizedWeight, cold: int) -> list[Contestant]:
    maker = import_module("gemlite.helper").A16W4_HQQ_INT(weight.codes.device, torch.float16)
    parts = weight.codes, weight.scales.pos, weight.scales.zero
    first = maker.from_weights(*parts)
    nbytes = first.W_q.nbytes + first.scales.nbytes + first.zeros.nbytes
    calls: list[Call] = [first, *(maker.from_weights(*parts) for _ in range(cold // nbytes))]
    return [Contestant("gemlite int4 float16", calls, nbytes, "float16", weight.dequantize)]


def contestants(W: Tensor, arguments: argparse.Namespace, cold: int, notes: dict[str, str]) -> list[Contestant]:
    """All that can be built."""
    group = arguments.groups[0]
    four = quantize_rtn(W, parse_scheme(f"int4-asym-g{group}"))
    makers = {COPY: partial(copier, W.device)} | {f"torch {dtype}": partial(plain, W, dtype) for dtype in FLOATS}
    makers |= {"torch int4pack": partial(int4pack, four), "gemlite": partial(gemlite, four)}
    makers |= {f"bitsandbytes nf4 {dtype}": partial(bitsandbytes, W, dtype, group) for dtype in FLOATS}
    makers |= {f"torchao {how}": partial(torchao, W, how, group) for how in ("plain", "tile_packed_to_4d")}
    for book, side, size in itertools.product(arguments.formats, ("asym", "sym"), arguments.groups):
        makers[f"{book}-{side}-g{size}"] = partial(ours, W, f"{book}-{side}-g{size}", arguments.dtypes)
    field = []
    for name, make in makers.items():
        try:
            field += make(cold)
        except Exception as error:
            notes[name] = f"left out: {why(error)}"
    return field


# ---- measuring


def ready(calls: list[Call], x: Tensor, pool: Any) -> tuple[Callable[[], Any], Tensor, str | None]:
    """(all calls, as a graph if they can be captured; the last result; why there is no graph)."""

    def run() -> Tensor:
        for call in calls:
            y = call(x)
        return y

    y = run()
    if not x.is_cuda:
        return run, y, None
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):  # compiles, tunes, and makes what a capture cannot
        run()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(here), torch.cuda.graph(graph, pool=pool):  # a failed capture does not go back to `here`
            y = run()
    except Exception as error:
        return run, y, why(error)
    for _ in range(2):  # the second finds what the first left behind
        graph.replay()
    return graph.replay, y, None


def turn(go: Callable[[], Any], cuda: bool) -> list[float]:
    """Microseconds."""
    if not cuda:
        began = time.perf_counter()
        go()
        return [1e6 * (time.perf_counter() - began)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(1 + REPLAYS)]
    for start, end in events:  # all are queued at once: the GPU never waits for the next
        start.record()
        go()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events[1:]]


def measure(field: list[Contestant], x: Tensor, rounds: int, notes: dict[str, str]) -> Results:
    """What was found with these inputs [tokens, in]."""
    results: Results = {}
    running: list[tuple[str, Callable[[], Any], int]] = []
    inputs = {name: x.to(dtype) for name, dtype in FLOATS.items()}  # graphs do not keep them
    least = 1 if not x.is_cuda else 32 if len(x) <= 64 else 8  # calls: starting a graph takes as long as a small one
    pool = torch.cuda.graph_pool_handle() if x.is_cuda else None  # shared: one graph runs after the other
    for one in field:
        given, calls, wrong = inputs[one.dtype], one.calls * -(-least // len(one.calls)), 0.0
        try:
            go, y, eager = ready(calls, given, pool)
            if one.weight is not None:
                expected = given.float() @ one.weight().T
                wrong = float((y.float() - expected).norm() / expected.norm())
            if not wrong <= TOLERANCE:  # NaN too
                raise ValueError(f"wrong by {wrong:.2g}")
        except Exception as error:
            notes[f"{one.name}, {len(x)} tokens"] = f"left out: {why(error)}"
            continue
        finally:
            y = expected = None  # the next one needs the memory
        if eager is not None:
            notes[f"{one.name}, {len(x)} tokens"] = f"no graph, so launching it counts: {eager}"
        results[one.name] = {"bytes": one.nbytes, "error": wrong, "graph": x.is_cuda and eager is None, "times": []}
        running.append((one.name, go, len(calls)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(running)
        for name, go, count in running:
            results[name]["times"] += [taken / count for taken in turn(go, x.is_cuda)]
    best = {name: min(result["times"]) for name, result in results.items()}
    for name, result in results.items():
        result |= {"microseconds": best[name], "median_microseconds": statistics.median(result.pop("times"))}
        result["gigabytes_a_second"] = result["bytes"] / best[name] / 1e3
        result["of_copy"] = result["bytes"] / best[name] / (results[COPY]["bytes"] / best[COPY])
        rivals = {} if name == COPY else {"to_float16": BASELINE}
        rivals |= {"asym_to_sym": name.replace("-asym-", "-sym-")} if "-asym-" in name else {}
        result |= {key: best[rival] / best[name] for key, rival in rivals.items() if rival in best}
    return results


def shape_report(shape: str, sizes: list[int], arguments: argparse.Namespace, cold: int) -> dict[str, Any]:
    """Measures one shape, prints its tables, and returns what is saved."""
    rows, columns = map(int, shape.split("x"))
    source = torch.Generator(arguments.device).manual_seed(0)  # torch's own may not survive a capture that fails
    W = torch.randn(rows, columns, generator=source, device=source.device) * 0.02
    x = torch.randn(max(sizes), columns, generator=source, device=source.device)
    notes: dict[str, str] = {}
    field = contestants(W, arguments, cold, notes)
    cells: dict[int, Results] = {}
    for tokens in sizes:
        print(f"{shape}, {tokens} tokens", file=sys.stderr, flush=True)
        cells[tokens] = measure(field, x[:tokens], arguments.rounds, notes)
        gpu._counters.clear()  # what the graphs had reserved: they are gone
    for key, (title, form) in FIGURES.items():
        found = {one.name: [cell.get(one.name, {}).get(key) for cell in cells.values()] for one in field}
        body = [[name, *("" if v is None else format(v, form) for v in row)] for name, row in found.items() if any(row)]
        print(f"### {shape}: {title}\n\n{table(['', *(f'{tokens} tokens' for tokens in cells)], body)}\n")
    print("".join(f"- {name}: {note}\n" for name, note in notes.items()), flush=True)
    return {"shape": shape, "notes": notes, "cells": [{"tokens": tokens, **cell} for tokens, cell in cells.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="OUTxIN", help=" ".join(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help=" ".join(map(str, TOKENS)))
    parser.add_argument("--formats", nargs="+", default=["nf4", "nf3", "int4", "fp4", "nf2"])
    parser.add_argument("--groups", type=int, nargs="+", default=[128], help="peers take the first")
    parser.add_argument("--dtypes", nargs="+", choices=list(FLOATS), default=["float16"], help="of ours")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="8192x8192, 1, 16, 256 tokens, nf4, nf3, 3 rounds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about: dict[str, Any] = {"device": "cpu", "cold_bytes": 0, "autotune": os.environ.get("AFPQ_AUTOTUNE") == "1"}
    about |= {name: installed(name) for name in ("torch", "triton", "bitsandbytes", "torchao", "gemlite")}
    usual = (["64x256"], [1, 20, 80, 300])  # for the interpreter
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            print("bench/gpu.py: torch finds no GPU here; with --device cpu you can see that it runs", file=sys.stderr)
            sys.exit(2)
        usual = (SHAPES[1:2], [1, 16, 256]) if arguments.quick else (SHAPES, TOKENS)
        found = torch.cuda.get_device_properties("cuda")
        about |= {"device": found.name, "cold_bytes": CACHES * found.L2_cache_size, "cuda": torch.version.cuda}
    if arguments.quick:
        arguments.formats, arguments.rounds = ["nf4", "nf3"], 3
    print(f"{about}\n", flush=True)
    if arguments.device == "cpu":
        print("Triton's interpreter, on a CPU: the times below mean nothing.\n", flush=True)
    report: dict[str, Any] = {"machine": about, "shapes": []}
    for shape in arguments.shapes or usual[0]:
        report["shapes"].append(shape_report(shape, arguments.tokens or usual[1], arguments, about["cold_bytes"]))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        gc.collect()  # layers that point at themselves


if __name__ == "__main__":
    with torch.no_grad():  # tensors of torchao's own kind do not like inference_mode
        main()
