# SPDX-License-Identifier: MIT
"""`afpq eval` and `afpq info`: figures of a model that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from afpq.commands.effect import given_options, idle_in_eval, refuse_idle
from afpq.commands.options import (
    DatasetOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    TrustOption,
    command,
)
from afpq.commands.output import (
    check_json_place,
    errors,
    progress_bar,
    quiet_transformers,
    results,
    save_json,
    use_threads,
)
from afpq.errors import AfpqError


@command("eval")
def evaluate_command(
    model: ModelArgument,
    context: typer.Context,
    text: TextOption = None,
    dataset: DatasetOption = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    reference: Annotated[str | None, typer.Option(help="Also measure KL divergence from this model.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks of lm-evaluation-harness, such as hellaswag,piqa (needs afpq[eval]).")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A directory with tasks of your own, in YAML.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a prompt, instead of the task's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts scored together in tasks.")] = 8,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks such as humaneval run code the model writes.")
    ] = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity with its standard error, the distance from a reference model, and scores on benchmarks."""
    from afpq.evaluation.benchmarks import TaskOptions, TaskRun
    from afpq.evaluation.devices import find_device
    from afpq.evaluation.loading import load_model, load_tokenizer
    from afpq.evaluation.text import read_text

    check_json_place(json)
    use_threads(threads)
    find_device(device)
    refuse_idle(given_options(context), idle_in_eval(text is not None or dataset is not None, tasks is not None))
    if tasks is not None and reference is not None and text is None and dataset is None:
        raise AfpqError("--reference needs text to compare on: --text FILE or --dataset NAME")
    content = read_text(text, dataset) if tasks is None or text is not None or dataset is not None else None
    result: dict[str, Any] = {}
    with quiet_transformers():
        run = None
        if tasks is not None:
            options = TaskOptions(include_path, limit, num_fewshot, batch_size, allow_code_execution)
            run = TaskRun(tasks.split(","), options, progress=errors.is_terminal)
        with progress_bar("loading"):
            loaded, tokenizer = load_model(model, trust_remote_code, device), load_tokenizer(model, trust_remote_code)
            other = None if reference is None else load_model(reference, trust_remote_code, device)
        if content is not None:
            result |= _measure_text(loaded, tokenizer, content, seq_len, max_tokens, other)
        if run is not None:
            with progress_bar("tasks", bar=False):  # at a terminal the harness has bars of its own
                scores = run.run(loaded, tokenizer)
            _print_tasks(scores, limit)
            result["tasks"] = {name: score.to_json() for name, score in scores.items()}
    save_json(json, result)


def _measure_text(
    model: Any, tokenizer: Any, text: str, seq_len: int, max_tokens: int | None, reference: Any
) -> dict[str, Any]:
    """Measure on a text, print the figures, and return them for `--json`."""
    from afpq.evaluation.loading import window_length
    from afpq.evaluation.perplexity import evaluate, logits_of
    from afpq.evaluation.text import tokenize, windows

    length = window_length(model, seq_len)
    token_windows = windows(tokenize(tokenizer, text), length, max_tokens)
    other = None if reference is None else logits_of(reference, token_windows)
    with progress_bar("windows") as advance:
        result = evaluate(model, token_windows, other, advance)
    results.print(f"perplexity      {result.perplexity:.4f} ± {result.standard_error:.4f}")
    results.print(f"tokens          {result.tokens:,} predicted, windows of {token_windows.shape[1]}")
    if result.kl_divergence is not None:
        results.print(f"KL divergence   {result.kl_divergence:.6f} ± {result.kl_standard_error:.6f} nats per token")
        results.print(f"top-1 agreement {100 * (result.top1_agreement or 0):.2f} %")
    return result.to_json()


def _print_tasks(scores: dict[str, Any], limit: int | None) -> None:
    """Print a line for each metric of each task: value, standard error, examples in the prompt, documents."""
    table = Table("task", "metric", "value", "shots", "documents", box=SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, score in scores.items():
        for key, value in score.metrics.items():
            metric, _, kind = key.partition(",")
            if not metric.endswith("_stderr"):
                error = score.metrics.get(f"{metric}_stderr,{kind}")
                text = f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
                shots, documents = (
                    "" if count is None else f"{count:,}" for count in (score.num_fewshot, score.documents)
                )
                table.add_row(name, metric if kind == "none" else f"{metric} ({kind})", text, shots, documents)
    results.print(table)
    if limit is not None:
        results.print(f"the first {limit:,} documents of each task only: not the benchmark's result")


@command()
def info(model: ModelArgument, json: JsonOption = None, trust_remote_code: TrustOption = False) -> None:
    """True bits per weight, coverage and sizes of a checkpoint, from its headers."""
    from afpq.checkpoint.info import model_info
    from afpq.commands.console import print_coverage
    from afpq.evaluation.tables import size_text

    check_json_place(json)
    with quiet_transformers():
        result = model_info(model, trust_remote_code)
    keys = result.quantization_config
    results.print(f"model           {model}")
    if result.published is not None:
        results.print(f"published as    {result.published}")
    if keys is None:
        results.print("scheme          not quantized")
    else:
        results.print(f"scheme          {', '.join(result.schemes())} by {keys.get('method')}")
    results.print(f"bits per weight {result.bits_per_weight:.4f}")
    for end in (layer for layer in result.layers if layer.name in result.ends):
        results.print(f"outside         {end.name} {end.scheme}, {end.bits_per_weight:.4f} bits per weight")
    results.print(f"whole file      {result.file_bits_per_weight:.4f} bits per weight")
    results.print(f"coverage        {100 * result.coverage:.2f} % of the blocks' weights")
    if result.quantization_config is not None:
        print_coverage(result.coverage, result.left)
    results.print(f"parameters      {result.quantized_parameters:,} quantized of {result.total_parameters:,}")
    results.print(f"files           {size_text(result.file_bytes)}")
    save_json(json, result.to_json())
