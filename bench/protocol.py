# SPDX-License-Identifier: MIT
"""What bench/autoround.py and bench/llama_cpp.py share: the protocol of bench/accuracy.py, for other tools' weights.

Each tool's dequantized weights go into one float32 model, measured by `afpq.evaluation.perplexity`: kernels play no
part, head and embeddings stay float. Calibrated tools learn from the very windows that `afpq.quantize` draws.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import table
from torch import Tensor, nn

import afpq
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.text import tokenize, windows
from afpq.jobs.prepare import Texts, prepare


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of bench/accuracy.py that say what is measured."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model")
    result.add_argument("--text", type=Path, required=True)
    result.add_argument("--calibration-text", type=Path, required=True)
    result.add_argument("--out", type=Path, required=True, help="rows are appended; those in it are not run again")
    result.add_argument("--seq-len", type=int, default=512)
    result.add_argument("--windows", type=int, default=200)
    result.add_argument("--samples", type=int, default=64)
    return result


@dataclass(frozen=True)
class Protocol:
    """`text` and `calibration` are token ids, int64 [windows, length]; `reference` the float model's logits of `text`;
    `done` the (scheme, method) of rows in `out`.
    """

    text: Tensor
    calibration: Tensor
    reference: list[Tensor]
    out: Path
    done: frozenset[tuple[str, str]]

    def add(self, model: nn.Module, scheme: str, method: str, bits: float, seconds: float, **notes: Any) -> None:
        """Measure a model, append its row; `seconds` of the processor, all threads together."""
        result = evaluate(model.float().eval(), self.text, self.reference).to_json()
        row = {"scheme": scheme, "method": method, "bits": bits, "seconds": round(seconds, 1), **result, **notes}
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[-1], flush=True)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    tokens = tokenize(load_tokenizer(arguments.model), arguments.text.read_text("utf-8"))
    text = windows(tokens, arguments.seq_len)[: arguments.windows]
    settings = afpq.CalibrationSettings(arguments.samples, arguments.seq_len)
    calibration = arguments.calibration_text.read_text("utf-8")
    recipe = afpq.Recipe(afpq.parse_scheme("nf3-asym-g64-log8"), "gptq")  # any calibrated one: the windows are the same
    job = prepare(arguments.model, recipe, Texts(calibration, evaluate=False), settings=settings)
    assert job.windows is not None, "a calibrated method has windows"
    reference = [logits.clone() for logits in logits_of(load_model(arguments.model), text)]
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = frozenset((row["scheme"], row["method"]) for row in rows)
    return Protocol(text, job.windows, reference, arguments.out, done)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantized: all but the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def most_values_in_a_group(weight: Tensor, group: int) -> int:
    """How many different values a group holds at most: no more than its codes, if the weight is what was stored."""
    values = weight.detach().reshape(-1, group).sort(1).values
    return int((values.diff(dim=1) != 0).sum(1).max()) + 1


def assert_quantized(model: nn.Module, group: int, codes: int) -> None:
    for name, linear in linears(model).items():
        found = most_values_in_a_group(linear.weight, group)
        assert found <= codes, f"{name}: {found} values in a group of {group}, {codes} codes"


def second_moments(model: nn.Module, calibration: Tensor) -> dict[str, Tensor]:
    """Mean square of each linear's inputs, float32 [in]."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears(model).items()]
    with torch.no_grad():
        for batch in calibration.split(4):
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (total / calibration.numel()).float() for name, total in sums.items()}
