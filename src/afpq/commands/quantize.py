# SPDX-License-Identifier: MIT
"""`afpq quantize` and `afpq demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from afpq.commands.console import (
    check_json_place,
    choice_json,
    console,
    outcome_json,
    plan_json,
    print_estimate,
    print_outcome,
    print_plan,
    progress_bar,
    quiet_transformers,
    save_json,
)
from afpq.commands.options import (
    DatasetOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    TextOption,
    TrustOption,
    WithBareOptions,
    app,
)
from afpq.errors import AfpqError
from afpq.numerics.scheme import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option(help="Write report.md, .json and .png into this directory.")] = None,
) -> None:
    """Quantize a small model that comes with the package in the paper's formats; needs no network."""
    from afpq.demo.demo_report import HEADER, cells, write_report
    from afpq.demo.run_demo import run_demo

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


@app.command(cls=WithBareOptions)
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The directory to create.")],
    format: Annotated[str, typer.Option(help="nf2-4, learned2-4, fp3-4, int2-4, int8, or lut:VALUE:...")] = "nf4",
    group_size: Annotated[int, typer.Option(help="Weights that share scales; -1: a whole row.")] = DEFAULT_GROUP_SIZE,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One scale a group, or one for each sign.")] = False,
    scale_dtype: Annotated[str, typer.Option(help="log8 (a byte a scale), float16 or float32.")] = DEFAULT_SCALE_DTYPE,
    method: Annotated[str, typer.Option(help="rtn, gptq, awq, awq+gptq or tune; all but rtn need text.")] = "rtn",
    scale_search: Annotated[
        str | None, typer.Option(help="absmax (the paper's; default of rtn) or mse (least squared error).")
    ] = None,
    text: TextOption = None,
    dataset: DatasetOption = None,
    eval_text: Annotated[
        Path | None, typer.Option("--eval-text", help="A UTF-8 text to measure the card's perplexity and KL on.")
    ] = None,
    card_measure: Annotated[
        bool, typer.Option("--card-measure/--no-card-measure", help="Measure the result where there is a text.")
    ] = True,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048,
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0,
    skip: Annotated[list[str] | None, typer.Option(help="Leave linears whose name matches this regex.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="'REGEX=SCHEME', as 'down_proj=nf4-asym-g64'.")] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            help="Choose the scheme of each layer: the least predicted KL at so many true bits. Needs text; also a "
            "dry run measures. Options of the scheme are then for the ends alone."
        ),
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="SCHEME,SCHEME,...", help="What --bits-per-weight chooses from.")
    ] = None,
    sensitivities: Annotated[
        Path | None,
        typer.Option(help="A file for what --bits-per-weight measured; used again where it is there."),
    ] = None,
    lm_head: Annotated[
        str | None,
        typer.Option(
            metavar="[SCHEME]", help="Quantize the output head too: as the rest, or as SCHEME (int8-sym-g64)."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(metavar="[SCHEME]", help="Quantize the embedding of tokens too; where tied, it is the head."),
    ] = None,
    damp: Annotated[float, typer.Option(help="GPTQ: share of the mean diagonal added to the Hessian.")] = 0.01,
    order: Annotated[str, typer.Option(help="GPTQ: order of the columns: group, act or none.")] = "group",
    sweeps: Annotated[int, typer.Option(help="GPTQ: rounds of coordinate descent afterwards.")] = 3,
    float_target: Annotated[
        bool, typer.Option("--float-target/--no-float-target", help="GPTQ: aim at the float model's outputs.")
    ] = True,
    sequential: Annotated[
        bool, typer.Option("--sequential/--no-sequential", help="GPTQ: quantize a block's layers one after the other.")
    ] = True,
    end_pass: Annotated[
        int,
        typer.Option(help="Steps of tuning all scales, norms and biases at the end, towards the original; try 200."),
    ] = 0,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Mixtures: each expert learns from all tokens, not only its own.")
    ] = False,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on where a stopped run was.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it takes.")] = False,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Quantize a checkpoint into a new directory, a block at a time."""
    from afpq.algorithms.solver_options import GptqOptions
    from afpq.evaluation.text import read_text
    from afpq.jobs.bit_budget import make_budget
    from afpq.jobs.estimate import estimate
    from afpq.jobs.execute import execute
    from afpq.jobs.prepare import CalibrationSettings, prepare, sensitivities_file
    from afpq.numerics.formats import parse_format
    from afpq.numerics.scheme import Scheme
    from afpq.recipe import Recipe, scheme_of_end

    scheme = Scheme(parse_format(format), group_size, sym, scale_dtype)
    recipe = Recipe(
        scheme,
        method,
        scale_search,
        tuple(skip or ()),
        tuple(_parse_override(pair) for pair in override or []),
        GptqOptions(damp, order, sweeps, float_target, sequential),
        scheme_of_end(lm_head, scheme),
        scheme_of_end(embedding, scheme),
        end_pass,
    )
    settings = CalibrationSettings(samples, seq_len, seed, device, all_experts)
    check_json_place(json)
    budget = make_budget(bits_per_weight, None if candidates is None else candidates.split(","))
    kept = None if budget is None else sensitivities_file(out, sensitivities, resume)
    content = read_text(text, dataset, calibration=True) if text is not None or dataset is not None else None
    test, test_name = _evaluation_text(eval_text, dataset if card_measure else None)
    with quiet_transformers(), progress_bar("start") as advance:
        job = prepare(
            model,
            recipe,
            text=content,
            eval_text=test,
            names=(str(text.name) if text is not None else f"{dataset}'s training split", test_name),
            measured=card_measure,
            settings=settings,
            trust_remote_code=trust_remote_code,
            budget=budget,
            sensitivities=kept,
            progress=advance,
        )
        outcome = None
        if not dry_run:
            outcome = execute(job, out, resume=resume, progress=advance)
            if kept is not None and sensitivities is None:
                kept.unlink(missing_ok=True)  # the result holds it
    print_plan(job, "would write" if outcome is None else "wrote", out)
    if outcome is None:
        print_estimate(estimate(job.plan, None if job.windows is None else (len(job.windows), job.windows.shape[1])))
    else:
        print_outcome(outcome)
    save_json(json, {**plan_json(job.plan), **choice_json(job.choice, job.plan), **outcome_json(outcome)})


def _evaluation_text(file: Path | None, dataset: str | None) -> tuple[str | None, str]:
    """(what to measure on, its name): the file, or else the test split of the dataset calibrated on."""
    from afpq.evaluation.text import read_text

    if file is not None:
        return read_text(file, None), file.name
    if dataset is not None:
        return read_text(None, dataset), f"{dataset}'s test split"
    return None, ""


def _parse_override(text: str) -> tuple[str, Any]:
    from afpq.numerics.scheme import parse_scheme

    pattern, separator, scheme = text.rpartition("=")
    if not separator or not pattern:
        raise AfpqError(f"override {text!r}: expected REGEX=SCHEME, for example '.*down_proj=nf4-asym-g64'")
    return pattern, parse_scheme(scheme)
