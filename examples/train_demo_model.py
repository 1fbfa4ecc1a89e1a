# SPDX-License-Identifier: MIT
"""Train the model that `afpq demo` quantizes, on the standard library of the Python that runs this script.

    python examples/train_demo_model.py --out src/afpq/demo/model

A 2.6-million-parameter Llama with its own BPE vocabulary, trained from nothing on the source and documentation
text of the standard library. The modules of HELD_OUT are kept from both the tokenizer and the training; their text
is what the demo measures perplexity on. Two cores need about an hour; `--steps 30` checks that the script runs.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sysconfig
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("bisect.py", "configparser.py", "heapq.py", "queue.py", "sched.py", "shelve.py", "textwrap.py")
SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "encodings", "lib2to3", "__pycache__"}
VOCABULARY = 2048
CONTEXT = 512


def corpus() -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): one string a module, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED_DIRECTORIES.isdisjoint(place.parts):
            text = path.read_text("utf-8", errors="ignore")
            (held_out if str(place) in HELD_OUT else training).append(text)
    return training, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts as one stream, each followed by the end token."""
    return torch.tensor([i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


def unigram_perplexity(training: Tensor, held_out: Tensor) -> float:
    """What a model that knows only how often each token occurs would score (add-one smoothing)."""
    counts = Counter(training.tolist())
    total = len(training) + VOCABULARY
    return math.exp(-sum(math.log((counts[i] + 1) / total) for i in held_out.tolist()) / len(held_out))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [model(window[None], labels=window[None]).loss for window in windows]
    return math.exp(torch.stack(losses).mean())


def train(model: LlamaForCausalLM, tokens: Tensor, steps: int, batch: int, peak: float) -> None:
    """AdamW with warm-up and a cosine to zero; no weight decay on vectors."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    generator = torch.Generator().manual_seed(0)
    start = time.monotonic()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        first = torch.randint(len(tokens) - CONTEXT, (batch,), generator=generator)
        ids = torch.stack([tokens[i : i + CONTEXT] for i in first.tolist()])
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - start:6.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    training_texts, held_out_texts = corpus()
    tokenizer = train_tokenizer(training_texts)
    training, held_out = tokens_of(training_texts, tokenizer), tokens_of(held_out_texts, tokenizer)
    print(f"{len(training):,} training tokens, {len(held_out):,} held out")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, training, arguments.steps, arguments.batch, arguments.learning_rate)
    model.eval()
    print(
        f"held-out perplexity {perplexity(model, held_out):.2f}, unigram {unigram_perplexity(training, held_out):.1f}"
    )

    shutil.rmtree(arguments.out, ignore_errors=True)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "held_out.txt").write_text("\n".join(held_out_texts), "utf-8")


if __name__ == "__main__":
    main()
