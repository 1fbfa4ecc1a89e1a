# SPDX-License-Identifier: MIT
"""Every scheme and method on one model: perplexity, KL and agreement at true bits, from the saved checkpoints.

    python bench/accuracy.py ../shared/models/lm6m --text ../shared/text/wikitext2-test.txt \
        --calibration-text ../shared/text/calibration.txt --out accuracy.jsonl

The protocol is that of docs/LOG.md: the first `--windows` windows of `--seq-len` tokens, calibration on `--samples`
windows. Rows already in `--out` are not run again; the table is printed at the end. A method is one of `afpq quantize`,
with the scale search behind a colon and the steps of an end pass behind `+end`: rtn:mse, tune+end100.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import afpq
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows

BUDGET = "budget "  # a row's scheme where the layers' schemes are chosen under a budget of bits
FORMATS = ("nf3", "nf4", "int3", "int4", "fp3", "fp4")


def schemes(formats: list[str]) -> list[str]:
    return [f"{f}-{sym}-g{group}" for f in formats for group in (128, 64) for sym in ("sym", "asym")]


def run(arguments: argparse.Namespace, scheme: str, method: str, text: Any, reference: list[Any]) -> dict[str, Any]:
    """Quantize into a scratch directory, load, measure."""
    solver, _, steps = method.partition("+end")
    method_name, _, search = solver.partition(":")
    options: dict[str, Any] = {"scale_search": search} if search else {}
    options["end_pass"] = int(steps or 0)
    if scheme.startswith(BUDGET):  # its sensitivities are measured once, and kept beside the rows
        options["bits_per_weight"] = float(scheme.removeprefix(BUDGET))
        options["sensitivities"] = arguments.out.with_suffix(f".{method_name}.sensitivities.json")
    settings = afpq.CalibrationSettings(arguments.samples, arguments.seq_len)
    calibration = (
        None
        if method_name == "rtn" and not steps and not scheme.startswith(BUDGET)
        else arguments.calibration_text.read_text("utf-8")
    )
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        plan = afpq.quantize(
            arguments.model,
            f"{scratch}/out",
            *([] if scheme.startswith(BUDGET) else [scheme]),
            method=method_name,
            text=calibration,
            settings=settings,
            evaluate=False,
            **options,
        ).plan
        seconds = time.perf_counter() - start
        model = AutoModelForCausalLM.from_pretrained(f"{scratch}/out", dtype="float32").dequantize()
    result = evaluate(model.float(), text, reference)
    return {
        "scheme": scheme,
        "method": method,
        "bits": plan.bits_per_weight,
        "seconds": round(seconds, 1),
        **result.to_json(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| true bits | scheme | method | perplexity | KL x1e3 | ± | top-1 % |", "|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda row: (round(row["bits"], 3), row["kl_divergence"])):
        kl, error = 1000 * r["kl_divergence"], 1000 * r["kl_standard_error"]
        lines.append(
            f"| {r['bits']:.3f} | {r['scheme']} | {r['method']} | {r['perplexity']:.2f} | {kl:.2f} "
            f"| {error:.2f} | {100 * r['top1_agreement']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="rtn,rtn:mse,gptq,awq,awq+gptq")
    parser.add_argument("--schemes", help="instead of all schemes of --formats: nf3-asym-g128,...")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--budgets", default="", help="also these true bits, by --bits-per-weight: 3.5,4.0")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["scheme"], row["method"]) for row in rows}
    tokens = tokenize(load_tokenizer(arguments.model), arguments.text.read_text("utf-8"))
    text = windows(tokens, arguments.seq_len)[: arguments.windows]
    original = load_model(arguments.model)
    reference = [logits.clone() for logits in logits_of(original, text)]
    print(f"float perplexity {evaluate(original, text).perplexity:.3f}", flush=True)
    for method in arguments.methods.split(","):
        chosen = arguments.schemes.split(",") if arguments.schemes else schemes(arguments.formats.split(","))
        chosen += [f"{BUDGET}{bits}" for bits in arguments.budgets.split(",") if bits]
        for scheme in chosen:
            if (scheme, method) not in done:
                rows.append(run(arguments, scheme, method, text, reference))
                with open(arguments.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
