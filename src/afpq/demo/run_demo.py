# SPDX-License-Identifier: MIT
"""The rows of `afpq demo`: each of the paper's formats on the embedded model. No network, under a minute.

The model is a 2.6-million-parameter Llama trained on the Python standard library by `examples/train_demo_model.py`;
perplexity is measured on modules that were not in the training text. See model/README.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from afpq.demo.demo_report import Row
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows
from afpq.model.linear import AfpqLinear
from afpq.model.quantize_in_memory import model_bits, quantize_model
from afpq.numerics.scheme import parse_scheme
from afpq.progress import Progress
from afpq.recipe import Recipe

MODEL = Path(__file__).parent / "model"
HELD_OUT = MODEL / "held_out.txt"
SCHEMES = tuple(
    f"{kind}{bits}-{sym}-g128" for bits in (4, 3) for kind in ("int", "fp", "nf") for sym in ("sym", "asym")
)
SEQUENCE, MAX_TOKENS = 512, 16_384


def run_demo(
    schemes: Sequence[str] = SCHEMES,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> list[Row]:
    """Return the original model's row, then one for each scheme, all on the same held-out text."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = windows(tokenize(tokenizer, HELD_OUT.read_text("utf-8")), SEQUENCE, max_tokens)
    reference = list(logits_of(model, text))
    parameters = sum(p.numel() for p in model.parameters())
    rows = [Row("float16", 16.0, 2 * parameters / 1e6, evaluate(model, text))]
    for index, scheme in enumerate(schemes):
        if progress is not None:
            progress(scheme, index, len(schemes))
        small = quantize_model(copy.deepcopy(model), Recipe(parse_scheme(scheme)))
        weights = sum(m.in_features * m.out_features for m in small.modules() if isinstance(m, AfpqLinear))
        bits = model_bits(small)
        megabytes = (2 * (parameters - weights) + bits * weights / 8) / 1e6
        rows.append(Row(scheme, bits, megabytes, evaluate(small, text, reference)))
    return rows
