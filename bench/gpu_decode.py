# SPDX-License-Identifier: MIT
"""How many tokens a second models of 1 and 8 billion weights (random, of Llama's shapes) generate on an NVIDIA GPU.

    python bench/gpu_decode.py [--models 1b 8b] [--new-tokens 128] [--rounds 5] [--out gpu_decode.json]
    python bench/gpu_decode.py --device cpu --models 1b --layers 2 --hidden 128     # without a GPU: shows that it runs

Batch 1, greedy, after a prompt of 16 tokens. A step is the whole model and the choice of the next token, captured in a
CUDA graph with the static cache of Transformers 5.23 (it counts positions itself, on the GPU) and replayed for each new
token. float16 is measured before each scheme, on the same model, which is then quantized in place: one copy of the
16-bit weights is all that has to fit. Speed is that of the median round, `best / best` that of the fastest ones; the
prompt does not count. Random weights cost what trained ones do.

The linears inside the blocks are quantized, as `afpq.quantize` does; embeddings and lm_head stay float16. `bytes` says
how much faster a model could be if memory were all that counted, GB/s how much of the memory's speed is used.
`agreement` shows that graph and kernels compute what they should: the share of new tokens that one pass over all of
them, without cache or graph, would have chosen too; a little below 1 where two logits nearly tie. AFPQ_AUTOTUNE=1 lets
ours measure its tiles.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear import installed, shown, table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from afpq.model.quantize_in_memory import quantize_model
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

SCHEMES = ["nf4-asym-g128", "nf3-asym-g128", "nf4-sym-g128"]
BASELINE = "float16"
PROMPT = 16
WARM = 3  # steps before the capture: they compile, tune, and make what a graph cannot
MODELS: dict[str, dict[str, int]] = {
    "1b": {  # TinyLlama
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "8b": {  # Llama 3
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


class Decoder:
    """Greedy decoding at batch 1: `start` reads the prompt, each `step` turns the last token into the next, in place.

    On a GPU `step` is a graph, so tensors that it reads or writes stay where they are.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int) -> None:
        room = -(-(PROMPT + max(new_tokens, WARM) + 1) // 64) * 64
        self.model, self.prompt = model, prompt
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=prompt.device)
        self.step: Callable[[], None] = self._step
        if prompt.is_cuda:
            self.step = self._captured()

    def _read(self, tokens: Tensor) -> None:
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def _step(self) -> None:
        self._read(self.token)

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.start()
            for _ in range(WARM):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def start(self) -> None:
        self.cache.reset()
        self._read(self.prompt)

    def agreement(self, new_tokens: int) -> float:
        """The share of tokens that one pass over all of them, without cache, would have chosen as well."""
        self.start()
        tokens = [self.prompt, self.token.clone()]
        for _ in range(new_tokens - 1):
            self.step()
            tokens.append(self.token.clone())
        chosen = torch.cat(tokens, 1)
        again = self.model(chosen, use_cache=False).logits[:, PROMPT - 1 : -1].argmax(-1)
        return float((again == chosen[:, PROMPT:]).float().mean())

    def seconds(self, new_tokens: int) -> float:
        """Of a step, on average over `new_tokens` of them."""
        self.start()
        if not self.token.is_cuda:
            began = time.perf_counter()
            for _ in range(new_tokens):
                self.step()
            return (time.perf_counter() - began) / new_tokens
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.step()  # while it runs the next ones are queued, so the GPU does not wait for them
        first.record()
        for _ in range(new_tokens):
            self.step()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / new_tokens


def config(name: str, layers: int | None, hidden: int | None) -> LlamaConfig:
    """The model's, with fewer layers, or as many heads as make `hidden`."""
    shape = dict(MODELS[name])
    if hidden is not None:
        size, share = shape["hidden_size"] // shape["num_attention_heads"], hidden / shape["hidden_size"]
        if hidden % size:
            sys.exit(f"--hidden {hidden}: heads of {name} have {size}, so use a multiple of that")
        for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
            shape[key] = max(1, int(shape[key] * share))
        shape["hidden_size"] = hidden
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    return LlamaConfig(**shape, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def build(shape: LlamaConfig, device: str) -> Any:
    """Random weights, made where they are used."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def token_bytes(model: Any) -> int:
    """Weights that a token reads: all but the embeddings, of which it reads a row."""
    tensors = [*model.parameters(), *model.buffers()]
    total: int = sum(t.nbytes for t in tensors) - sum(t.nbytes for t in model.model.embed_tokens.parameters())
    return total


def measure(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    source = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), generator=source).to(arguments.device)
    decoder = Decoder(model, prompt, arguments.new_tokens)
    agreement = decoder.agreement(arguments.new_tokens)
    times = [decoder.seconds(arguments.new_tokens) for _ in range(arguments.rounds)]
    median, nbytes = statistics.median(times), token_bytes(model)
    return {
        "tokens_a_second": 1 / median, "best_tokens_a_second": 1 / min(times), "bytes_a_token": nbytes,
        "gigabytes_a_second": nbytes / median / 1e9, "agreement": agreement,
    }  # fmt: skip


def compare(result: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """With ratios to the float16 that was measured just before."""
    return result | {
        "speed": result["tokens_a_second"] / plain["tokens_a_second"],
        "best_speed": result["best_tokens_a_second"] / plain["best_tokens_a_second"],
        "bytes": plain["bytes_a_token"] / result["bytes_a_token"],
        "float16_tokens_a_second": plain["tokens_a_second"],
    }


def model_results(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for scheme in arguments.schemes:
        print(f"{name}: {BASELINE}, then {scheme}", file=sys.stderr, flush=True)
        model = build(config(name, arguments.layers, arguments.hidden), arguments.device)
        plain = measure(model, arguments)
        results.setdefault(BASELINE, compare(plain, plain))
        quantize_model(model, Recipe(parse_scheme(scheme)))
        results[scheme] = compare(measure(model, arguments), plain)
        del model
        gc.collect()  # the next model needs the memory
    return results


def shown_table(results: dict[str, dict[str, Any]]) -> str:
    head = ["", "tokens / second", f"/ {BASELINE}", "best / best", "bytes", "GB/s", "agreement"]
    keys = {"tokens_a_second": 1, "speed": 2, "best_speed": 2, "bytes": 2, "gigabytes_a_second": 0, "agreement": 3}
    rows = [[name, *(shown(row[key], digits) for key, digits in keys.items())] for name, row in results.items()]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer, for a quick look")
    parser.add_argument("--hidden", type=int, help="narrower, for a quick look")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for trying the script")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu_decode.py: torch finds no GPU here; --device cpu shows that it runs", file=sys.stderr)
        sys.exit(2)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu, without a graph: no figure of a GPU"
    about = {"device": device, "autotune": os.environ.get("AFPQ_AUTOTUNE") == "1", "cuda": torch.version.cuda}
    about |= {name: installed(name) for name in ("torch", "triton", "transformers")}
    print(f"{about}\n", flush=True)
    settings = {key: getattr(arguments, key) for key in ("new_tokens", "rounds", "layers", "hidden")}
    report: dict[str, Any] = {"machine": about, "settings": settings, "models": {}}
    for name in arguments.models:
        report["models"][name] = results = model_results(name, arguments)
        print(f"### {name}\n\n{shown_table(results)}\n", flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
