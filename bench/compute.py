# SPDX-License-Identifier: MIT
"""What int8 arithmetic costs in quality: perplexity and KL of the same quantized model, exact against int8.

    python bench/compute.py ../shared/models/lm6m --text ../shared/text/wikitext2-test.txt [--out compute.json]

int8 is for at most 6 tokens at a time, as in generation; here every token of the text goes through it, six by six. KL
is against the same model in exact arithmetic: what int8 alone does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows
from afpq.kernels import set_compute
from afpq.model.linear import AfpqLinear
from afpq.model.quantize_in_memory import quantize_model
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

TOKENS = 6


def six_by_six(layer: AfpqLinear, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
    """Forward hook: the layer's output again, from few tokens at a time."""
    x = args[0].flatten(0, -2)
    return torch.cat([layer.forward(part) for part in x.split(TOKENS)]).view(*args[0].shape[:-1], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--schemes", default="nf4-asym-g128,nf3-asym-g128,int4-asym-g128,fp4-sym-g64,nf3-asym-g32")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tokens = tokenize(load_tokenizer(arguments.model), arguments.text.read_text("utf-8"))
    text = windows(tokens, arguments.seq_len)[: arguments.windows]
    rows = []
    print("| scheme | perplexity, exact | int8 | change | KL x1e6 of int8 against exact |\n|---|---|---|---|---|")
    for name in arguments.schemes.split(","):
        model = quantize_model(load_model(arguments.model), Recipe(parse_scheme(name), "rtn", scale_search="mse"))
        set_compute("exact")
        reference = [logits.clone() for logits in logits_of(model, text)]
        exact = evaluate(model, text)
        for layer in model.modules():
            if isinstance(layer, AfpqLinear):
                layer.register_forward_hook(six_by_six)  # type: ignore[arg-type]
        set_compute("int8")
        int8 = evaluate(model, text, reference)
        change = int8.perplexity / exact.perplexity - 1
        assert int8.kl_divergence is not None
        rows.append({"scheme": name, "exact": exact.to_json(), "int8": int8.to_json(), "change": change})
        print(
            f"| {name} | {exact.perplexity:.3f} | {int8.perplexity:.3f} | {100 * change:+.4f} % "
            f"| {1e6 * int8.kl_divergence:.1f} |",
            flush=True,
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
