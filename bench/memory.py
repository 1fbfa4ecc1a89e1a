# SPDX-License-Identifier: MIT
"""Peak memory and time of whole runs beside what `--dry-run` predicted, for random models of growing depth.

    python bench/memory.py [--hidden 1024] [--layers 2 8] [--methods rtn gptq awq] [--out memory.json]

Memory is the process' anonymous memory (RssAnon), sampled every 5 ms in a process of its own for each run: files that
are mapped, such as the checkpoint and the hidden states, can be dropped by the system and are not counted. The claim
is that depth does not matter: one block and one batch at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import afpq
from afpq.algorithms.methods import METHODS
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.jobs import selftest
from afpq.jobs.estimate import estimate
from afpq.jobs.execute import execute
from afpq.jobs.prepare import Job
from afpq.model.skeleton import build_skeleton
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

CALIBRATION = afpq.CalibrationSettings(samples=16, seq_len=512)


def anonymous() -> int:
    """Bytes of this process' memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say RssAnon")


def save_model(directory: Path, hidden: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def measure(model: str, method: str) -> dict[str, float]:
    """Quantize once here; what it took and what had been predicted."""
    checkpoint, skeleton = open_checkpoint(model), build_skeleton(Path(model))
    plan = make_plan(checkpoint, skeleton, Recipe(parse_scheme("nf3-asym-g128"), method))
    windows = None
    if METHODS[method].calibrated:  # random tokens: no tokenizer is needed
        windows = torch.randint(0, 4096, (CALIBRATION.samples, CALIBRATION.seq_len))
    job = Job(plan, skeleton, CALIBRATION, windows)
    selftest.available_memory = lambda: 0  # the run itself is measured, not the model loaded at its end
    expected = estimate(job.plan, None if windows is None else (len(windows), windows.shape[1]))
    peak, done = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        execute(job, Path(scratch) / "out")
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "peak_bytes": peak,
        "expected_bytes": expected.memory_bytes,
        "seconds": seconds,
        "expected_seconds": expected.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as scratch:
            save_model(Path(scratch), arguments.hidden, layers)
            for method in arguments.methods:
                command = [sys.executable, __file__, "--one", scratch, method]
                result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row = {"layers": layers, "method": method, **json.loads(result.splitlines()[-1])}
                rows.append(row)
                print(
                    f"{layers:3} blocks  {method:8}  peak {row['peak_bytes'] / 1e6:6.0f} MB"
                    f" (predicted {row['expected_bytes'] / 1e6:.0f})"
                    f"  time {row['seconds'] / row['expected_seconds']:.2f} of the predicted",
                    flush=True,
                )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
