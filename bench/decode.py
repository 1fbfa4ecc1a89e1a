# SPDX-License-Identifier: MIT
"""How many tokens a second a model of TinyLlama's shape (1.1 billion weights, random) generates on this CPU.

    python bench/decode.py [--layers 22] [--new-tokens 32] [--rounds 3] [--out decode.json]

Batch 1, a prompt of 16 tokens, greedy `generate` of Transformers with its cache; bfloat16 beside our schemes in exact
and in int8 arithmetic, in one process and in turns, so that noise of the machine hits all alike. Speed is that of the
median token after the first; the prompt counts apart. Random weights cost what trained ones do.

The linears inside the blocks are quantized, as `afpq.quantize` does; embeddings and lm_head stay bfloat16. So lm_head
is a large share of the bytes that a token reads, and more so with few `--layers`: `bytes` says how much faster a model
could be if memory were all that counted. On processors without bfloat16 units (AVX2) torch's bfloat16 is slow, and
lm_head with it; `--dtype float32` compares with float32 throughout.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from afpq.kernels import cpu_library, set_compute
from afpq.model.quantize_in_memory import quantize_model
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

SCHEMES = ["nf4-asym-g128", "nf3-asym-g128", "nf4-sym-g128"]
PROMPT = 16


@dataclass
class Contestant:
    name: str
    model: Any
    mode: str = "exact"


class Clock(BaseStreamer):  # type: ignore[misc]
    """When the prompt came, and every token after it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def build(layers: int, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def quantized(model: Any, scheme: str) -> Any:
    """A quantized copy; what is not quantized is shared with the model."""
    shared = [*model.model.embed_tokens.parameters(), *model.lm_head.parameters()]
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return quantize_model(twin, Recipe(parse_scheme(scheme)))


def token_bytes(model: Any) -> int:
    """Weights that a token reads: all but the embeddings, of which it reads a row."""
    tensors = [*model.parameters(), *model.buffers()]
    total: int = sum(t.nbytes for t in tensors) - sum(t.nbytes for t in model.model.embed_tokens.parameters())
    return total


def generate(contestant: Contestant, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds of the prompt with the first token, and of each token after it."""
    clock = Clock()
    set_compute(contestant.mode)
    start = time.perf_counter()
    contestant.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, use_cache=True, streamer=clock,
    )  # fmt: skip
    tokens = clock.times[1:]  # the prompt itself comes first
    assert len(tokens) == new_tokens
    return tokens[0] - start, [after - before for before, after in itertools.pairwise(tokens)]


def field(arguments: argparse.Namespace) -> list[Contestant]:
    dtype = getattr(torch, arguments.dtype)
    plain = build(arguments.layers, dtype)
    contestants = [Contestant(arguments.dtype, plain)]
    modes = ["exact"] if cpu_library.native() is None else ["exact", "int8"]
    for scheme in arguments.schemes:
        print(f"quantizing to {scheme}", file=sys.stderr, flush=True)
        model = quantized(plain, scheme)
        contestants += [Contestant(f"{scheme} {mode}", model, mode) for mode in modes]
    return contestants


def summarize(contestants: list[Contestant], prompts: list[list[float]], tokens: list[list[float]]) -> dict[str, Any]:
    """By name; ratios to the first contestant, of speeds."""
    read = [token_bytes(contestant.model) for contestant in contestants]
    return {
        contestant.name: {
            "tokens_a_second": 1 / statistics.median(tokens[i]),
            "best_tokens_a_second": 1 / min(tokens[i]),
            "prompt_seconds": min(prompts[i]),
            "bytes_a_token": read[i],
            "speed": statistics.median(tokens[0]) / statistics.median(tokens[i]),
            "best_speed": min(tokens[0]) / min(tokens[i]),
            "prompt_speed": min(prompts[0]) / min(prompts[i]),
            "bytes": read[0] / read[i],
        }
        for i, contestant in enumerate(contestants)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    contestants = field(arguments)
    prompt = torch.randint(0, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts: list[list[float]] = [[] for _ in contestants]
    tokens: list[list[float]] = [[] for _ in contestants]
    for round_ in range(-1, arguments.rounds):
        print(f"round {round_ + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        for i, contestant in enumerate(contestants):
            first, rest = generate(contestant, prompt, arguments.new_tokens if round_ >= 0 else 2)
            if round_ >= 0:  # before that it is warming up
                prompts[i].append(first)
                tokens[i] += rest
    results = summarize(contestants, prompts, tokens)
    print(f"| | tokens / second | / {arguments.dtype} | best token / best | prompt / {arguments.dtype} | bytes |")
    print("|---|---|---|---|---|---|")
    for name, row in results.items():
        print(
            f"| {name} | {row['tokens_a_second']:.1f} | {row['speed']:.2f} | {row['best_speed']:.2f} "
            f"| {row['prompt_speed']:.2f} | {row['bytes']:.2f} |"
        )
    if arguments.out is not None:
        native = cpu_library.native()
        machine = {
            "threads": torch.get_num_threads(), "afpq_isa": None if native is None else native.isa,
            "torch_capability": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg()[0],
        }  # fmt: skip
        settings = {"layers": arguments.layers, "new_tokens": arguments.new_tokens, "rounds": arguments.rounds}
        report = {"machine": machine, "settings": settings, "results": results}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
