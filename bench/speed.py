# SPDX-License-Identifier: MIT
"""How long one 4096 x 4096 layer takes to quantize, beside what this machine can do: a copy, a matrix product.

    python bench/speed.py [--size 4096] [--out speed.json]

Bare times mean nothing on a shared machine; the ratios to the yardsticks, measured in the same run, do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from afpq.algorithms import quantize_gptq, quantize_rtn
from afpq.algorithms.gptq import factorize
from afpq.algorithms.solver_options import GptqOptions
from afpq.numerics.packing import to_tensors
from afpq.numerics.scheme import parse_scheme


def seconds(work: Callable[[], object], runs: int = 3) -> float:
    """The best of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    n = arguments.size
    torch.manual_seed(0)
    W, X = torch.randn(n, n) * 0.02, torch.randn(2 * n, n) * torch.rand(n).exp()
    H = X.T @ X
    copy, product = seconds(lambda: W.clone()), seconds(lambda: W @ H, 1)
    result = {"threads": torch.get_num_threads(), "size": n, "copy_seconds": copy, "product_seconds": product}
    for name in ("nf4-asym-g128", "nf4-sym-g128", "nf3-asym-g128", "int4-asym-g128"):
        scheme = parse_scheme(name)
        rtn = seconds(lambda scheme=scheme: to_tensors(quantize_rtn(W, scheme)))  # type: ignore[misc]
        result[f"rtn {name}"] = {"million_weights_a_second": n * n / rtn / 1e6, "copies": rtn / copy}
    scheme = parse_scheme("nf3-asym-g128")
    search = seconds(lambda: quantize_rtn(W, scheme, "mse"), 1)
    result["rtn mse nf3-asym-g128"] = {"million_weights_a_second": n * n / search / 1e6, "copies": search / copy}
    steps = {
        "factorize": lambda: factorize(H, 0.01),
        "gptq without descent, absmax": lambda: quantize_gptq(W, H, scheme, GptqOptions(sweeps=0), "absmax"),
        "gptq without descent, mse": lambda: quantize_gptq(W, H, scheme, GptqOptions(sweeps=0)),
        "gptq, 3 sweeps, mse": lambda: quantize_gptq(W, H, scheme),
    }
    for name, work in steps.items():
        spent = seconds(work, 1)
        result[name] = {"seconds": spent, "products": spent / product}
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
