# SPDX-License-Identifier: MIT
"""The command line: arguments -> values -> the functions of the library. Wrong input: one line, exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

from afpq.console import (
    check_json_place,
    console,
    errors,
    plan_json,
    print_estimate,
    print_plan,
    progress_bar,
    quiet_transformers,
    save_json,
    size_text,
)
from afpq.errors import AfpqError

app = typer.Typer(
    help="Make large language models small: 2- to 4-bit weights with a scale for each sign (AFPQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(help="A directory, or the id of a model on the hub.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
TextOption = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="wikitext2, ptb or c4 (needs afpq[eval]).")]


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option(help="Write report.md, .json and .png into this directory.")] = None,
) -> None:
    """Quantize a small model that comes with the package in the paper's formats; needs no network."""
    from afpq.demo import run_demo
    from afpq.report import HEADER, cells, write_report

    with quiet_transformers(), progress_bar("float16") as advance:
        rows = run_demo(progress=advance)
    title = "One scale against two, round-to-nearest"
    table = Table(*HEADER, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, row in enumerate(rows):
        table.add_row(*cells(row), end_section=index % 6 == 0)
    console.print(table)
    text = (
        "A 2.6-million-parameter Llama trained on the Python standard library, measured on modules it has never "
        "seen. KL is the distance from the original model's predictions; `asym` has one scale for the positive and "
        "one for the negative weights of each group (integers: a scale and a zero point)."
    )
    console.print(text.replace("`", ""))
    if report is not None:
        for path in write_report(report, title, text, rows):
            console.print(f"wrote {path}")
        if not (report / "report.png").exists():
            console.print("no picture: pip install 'afpq[plot]' for one")


@app.command()
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The directory to create.")],
    format: Annotated[str, typer.Option(help="nf2-4, fp3-4, int2-4, int8, or lut:VALUE:VALUE:...")] = "nf4",
    group_size: Annotated[int, typer.Option(help="Weights that share scales; -1: a whole row.")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One scale a group, or one for each sign.")] = False,
    method: Annotated[str, typer.Option(help="rtn, gptq, awq or awq+gptq; all but rtn need text.")] = "rtn",
    scale_search: Annotated[
        str | None, typer.Option(help="absmax (the paper's; default of rtn) or mse (least squared error).")
    ] = None,
    text: TextOption = None,
    dataset: DatasetOption = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    skip: Annotated[list[str] | None, typer.Option(help="Leave linears whose name matches this regex.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="'REGEX=SCHEME', as 'down_proj=nf4-asym-g64'.")] = None,
    damp: Annotated[float, typer.Option(help="GPTQ: share of the mean diagonal added to the Hessian.")] = 0.01,
    order: Annotated[str, typer.Option(help="GPTQ: order of the columns: group, act or none.")] = "group",
    sweeps: Annotated[int, typer.Option(help="GPTQ: rounds of coordinate descent afterwards.")] = 3,
    float_target: Annotated[
        bool, typer.Option("--float-target/--no-float-target", help="GPTQ: aim at the float model's outputs.")
    ] = True,
    sequential: Annotated[
        bool, typer.Option("--sequential/--no-sequential", help="GPTQ: quantize a block's layers one after the other.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on where a stopped run was.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it takes.")] = False,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Quantize a checkpoint into a new directory, a block at a time."""
    from afpq.api import CalibrationSettings, execute, prepare
    from afpq.data import read_text
    from afpq.estimate import estimate
    from afpq.formats import parse_format
    from afpq.scheme import GptqOptions, Recipe, Scheme

    recipe = Recipe(
        Scheme(parse_format(format), group_size, sym),
        method,
        scale_search,
        tuple(skip or ()),
        tuple(_parse_override(pair) for pair in override or []),
        GptqOptions(damp, order, sweeps, float_target, sequential),
    )
    settings = CalibrationSettings(samples, seq_len, seed, device)
    check_json_place(json)
    content = read_text(text, dataset, calibration=True) if text is not None or dataset is not None else None
    with quiet_transformers():
        job = prepare(model, recipe, text=content, settings=settings, trust_remote_code=trust_remote_code)
        if not dry_run:
            with progress_bar("start") as advance:
                execute(job, out, resume=resume, progress=advance)
    print_plan(job, "would write" if dry_run else "wrote", out)
    if dry_run:
        print_estimate(estimate(job.plan, None if job.windows is None else (len(job.windows), job.windows.shape[1])))
    save_json(json, plan_json(job.plan))


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
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a text, greedily."""
    from afpq.kernels import set_compute
    from afpq.loading import generate_text, load_model, load_tokenizer

    set_compute(compute)
    with quiet_transformers():
        loaded, tokenizer = load_model(model, trust_remote_code), load_tokenizer(model, trust_remote_code)
        text = generate_text(loaded, tokenizer, prompt, max_new_tokens)
    console.print(text)


def _parse_override(text: str) -> tuple[str, Any]:
    from afpq.scheme import parse_scheme

    pattern, separator, scheme = text.rpartition("=")
    if not separator or not pattern:
        raise AfpqError(f"override {text!r}: expected REGEX=SCHEME, for example '.*down_proj=nf4-asym-g64'")
    return pattern, parse_scheme(scheme)


class _Stop:
    """Handler of SIGINT and SIGTERM; it remembers, since libraries may turn the exception into one of their own."""

    called = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        self.called = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point of `afpq`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, stop)
    try:
        if app(standalone_mode=False) == 130:  # Typer's own way to say that it was interrupted
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _stopped()
    except Exception as error:
        if stop.called:
            _stopped()
        if isinstance(error, AfpqError):
            _fail(str(error))
        # Click's own errors, whichever copy of Click Typer brings
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message() or "see afpq --help")


def _stopped() -> NoReturn:
    errors.print("afpq: stopped; the same command goes on from the last finished block")
    sys.exit(130)


def _fail(message: str) -> NoReturn:
    errors.print(f"afpq: {' '.join(message.split())}")
    sys.exit(2)
