# SPDX-License-Identifier: MIT
"""QLoRA: quantize a model to 3 bits, train LoRA adapters on a text, and measure on parts of it they never saw.

    python examples/lora.py                                    # the demo model, offline, under a minute on 2 cores
    python examples/lora.py --model Qwen/Qwen3-0.6B --text my.txt --seq-len 512 --steps 300 --out my-adapter

A model that is quantized already, such as the result of `afpq quantize --method gptq`, is taken as it is. It needs
`pip install 'afpq[peft]'`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import afpq
import afpq.integrations.peft  # teaches PEFT the quantized layers
from afpq.demo.run_demo import HELD_OUT, MODEL
from afpq.evaluation.devices import find_device
from afpq.evaluation.loading import load_tokenizer, quiet_transformers
from afpq.evaluation.perplexity import evaluate
from afpq.evaluation.text import tokenize, windows

EVERY = 8  # this many windows, one is held out
MEASURED = 64  # windows at most, for each figure


def arguments_of(line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="directory or hub id; default: the embedded demo model")
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="file to train on; default: text of the demo")
    parser.add_argument("--format", default="nf3")
    parser.add_argument("--out", type=Path, default=Path("lora-adapter"), help="where the adapter goes")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-4, for the tiny demo model 2e-3")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    arguments = parser.parse_args(line)
    if arguments.learning_rate is None:
        arguments.learning_rate = 2e-3 if arguments.model == str(MODEL) else 2e-4
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; choose another --out")
    if not arguments.text.is_file():
        parser.error(f"{arguments.text}: no such file")
    return arguments


def load_quantized(name: str, format: str) -> Any:
    """The model, quantized while loading unless it was before."""
    options: dict[str, Any] = {}
    if getattr(AutoConfig.from_pretrained(name), "quantization_config", None) is None:
        options["quantization_config"] = afpq.AfpqConfig(format=format)
    device = find_device("auto")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options).to(device)


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [count, length] -> those to train on, those held out: some of every part of the text."""
    held_out = torch.arange(len(text)) % EVERY == EVERY - 1
    return text[~held_out], text[held_out]


def train(model: Any, text: Tensor, arguments: argparse.Namespace) -> None:
    settings = TrainingArguments(
        str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.steps // 20,
        logging_steps=max(1, arguments.steps // 6),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    examples = [{"input_ids": window, "labels": window} for window in text]
    Trainer(model, settings, train_dataset=examples).train()


def main(line: list[str] | None = None) -> None:
    arguments = arguments_of(line)
    set_seed(0)
    tokens = tokenize(load_tokenizer(arguments.model), arguments.text.read_text("utf-8"))
    training, held_out = split(windows(tokens, arguments.seq_len))
    if len(held_out) == 0:
        sys.exit(f"{arguments.text} is too short: {EVERY} windows of {arguments.seq_len} tokens are needed")
    with quiet_transformers():
        model = load_quantized(arguments.model, arguments.format)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = get_peft_model(
        model,
        LoraConfig(task_type="CAUSAL_LM", r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear"),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters to train, on {len(training)} windows; {len(held_out)} held out")

    def measure() -> tuple[float, float]:
        """(loss on training windows, perplexity on held-out windows)."""
        model.eval()
        loss = math.log(evaluate(model, training[:MEASURED]).perplexity)
        return loss, evaluate(model, held_out[:MEASURED]).perplexity

    before = measure()
    train(model, training, arguments)
    after = measure()
    model.save_pretrained(arguments.out)
    print(f"training loss        {before[0]:8.3f} -> {after[0]:.3f}")
    print(f"held-out perplexity  {before[1]:8.2f} -> {after[1]:.2f}")
    print(f"the adapter is in {arguments.out}: model = PeftModel.from_pretrained(model, {str(arguments.out)!r})")


if __name__ == "__main__":
    main()
