# SPDX-License-Identifier: MIT
"""`afpq eval`, `afpq info` and `afpq generate`: what can be done with a model that is there."""

from __future__ import annotations

from typing import Annotated

import typer

from afpq.commands.common import (
    DatasetOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    TextOption,
    TrustOption,
    app,
)
from afpq.console import check_json_place, console, progress_bar, quiet_transformers, save_json, size_text


@app.command("eval")
def evaluate_command(
    model: ModelArgument,
    text: TextOption = None,
    dataset: DatasetOption = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    reference: Annotated[str | None, typer.Option(help="Also measure KL divergence from this model.")] = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity with its standard error, and the distance from a reference model."""
    from afpq.data import read_text, tokenize, windows
    from afpq.evaluate import evaluate, logits_of
    from afpq.loading import context_length, load_model, load_tokenizer

    check_json_place(json)
    content = read_text(text, dataset)
    with quiet_transformers():
        loaded = load_model(model, trust_remote_code)
        length = min(seq_len, context_length(loaded) or seq_len)
        token_windows = windows(tokenize(load_tokenizer(model, trust_remote_code), content), length, max_tokens)
        other = None if reference is None else logits_of(load_model(reference, trust_remote_code), token_windows)
        with progress_bar("windows") as advance:
            result = evaluate(loaded, token_windows, other, lambda done, total: advance("windows", done, total))
    console.print(f"perplexity      {result.perplexity:.4f} ± {result.standard_error:.4f}")
    console.print(f"tokens          {result.tokens:,} predicted, windows of {token_windows.shape[1]}")
    if result.kl_divergence is not None:
        console.print(f"KL divergence   {result.kl_divergence:.6f} ± {result.kl_standard_error:.6f} nats per token")
        console.print(f"top-1 agreement {100 * (result.top1_agreement or 0):.2f} %")
    save_json(json, result.to_json())


@app.command()
def info(model: ModelArgument, json: JsonOption = None, trust_remote_code: TrustOption = False) -> None:
    """True bits per weight, coverage and sizes of a checkpoint, from its headers."""
    from afpq.info import model_info

    check_json_place(json)
    with quiet_transformers():
        result = model_info(model, trust_remote_code)
    keys = result.quantization_config
    console.print(f"model           {model}")
    if keys is None:
        console.print("scheme          not quantized")
    else:
        schemes = sorted({layer.scheme for layer in result.layers})
        console.print(f"scheme          {', '.join(schemes)} by {keys.get('method')}")
    console.print(f"bits per weight {result.bits_per_weight:.4f}")
    console.print(f"coverage        {100 * result.coverage:.2f} % of the blocks' weights")
    console.print(f"parameters      {result.quantized_parameters:,} quantized of {result.total_parameters:,}")
    console.print(f"files           {size_text(result.file_bytes)}")
    save_json(json, result.to_json())


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    compute: Annotated[str, typer.Option(help="Arithmetic on a CPU: exact, or int8, which is faster.")] = "exact",
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a text, greedily."""
    from afpq.kernels import set_compute
    from afpq.loading import generate_text, load_model, load_tokenizer

    set_compute(compute)
    with quiet_transformers():
        loaded, tokenizer = load_model(model, trust_remote_code, device), load_tokenizer(model, trust_remote_code)
        text = generate_text(loaded, tokenizer, prompt, max_new_tokens)
    console.print(text)
