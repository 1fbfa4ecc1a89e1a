# SPDX-License-Identifier: MIT
"""`afpq quantize` and `afpq demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from afpq.algorithms.methods import METHODS, NEAREST
from afpq.commands.effect import Use, given_options, idle_options, refuse_idle
from afpq.commands.flags import option_parameters, option_types, options_of, with_flags
from afpq.commands.options import (
    DatasetOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    TextOption,
    ThreadsOption,
    TrustOption,
    WithBareOptions,
    command,
)
from afpq.commands.output import (
    check_json_place,
    console,
    note,
    progress_bar,
    quiet_transformers,
    results,
    save_json,
    use_threads,
)
from afpq.errors import AfpqError
from afpq.numerics.formats import parse_format
from afpq.numerics.scheme import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE, Scheme, parse_scheme
from afpq.recipe import SAME, Recipe, scheme_of_end

if TYPE_CHECKING:
    from afpq.jobs.prepare import Texts


@command()
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
    results.print(table)
    text = (
        "A 2.6-million-parameter Llama trained on the Python standard library, measured on modules it has never "
        "seen. KL is the distance from the original model's predictions; `asym` has one scale for the positive and "
        "one for the negative weights of each group (integers: a scale and a zero point)."
    )
    console.print(text.replace("`", ""))
    if report is not None:
        for path in write_report(report, title, text, rows):
            results.print(f"wrote {path}")
        if not (report / "report.png").exists():
            console.print("no picture: pip install 'afpq[plot]' for one")


METHODS_HELP = (
    f"{', '.join([*METHODS][:-1])} or {[*METHODS][-1]}; "
    f"all but {', '.join(name for name, method in METHODS.items() if not method.calibrated)} need text."
)


@dataclass(frozen=True)
class SchemeFlags:
    """How weights are stored, and how codes are found."""

    format: Annotated[str, typer.Option(help="nf2-4, learned2-4, fp3-4, int2-4, int8, or lut:VALUE:...")] = "nf4"
    group_size: Annotated[int, typer.Option(help="Weights that share scales; -1: a whole row.")] = DEFAULT_GROUP_SIZE
    sym: Annotated[bool, typer.Option("--sym/--asym", help="One scale a group, or one for each sign.")] = False
    scale_dtype: Annotated[str, typer.Option(help="log8 (a byte a scale), float16 or float32.")] = DEFAULT_SCALE_DTYPE
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = NEAREST
    scale_search: Annotated[
        str | None, typer.Option(help="absmax (the paper's; default of rtn) or mse (least squared error).")
    ] = None


@dataclass(frozen=True)
class TextFlags:
    """Calibration and evaluation texts."""

    text: TextOption = None
    dataset: DatasetOption = None
    eval_text: Annotated[
        Path | None, typer.Option("--eval-text", help="A UTF-8 text to measure the card's perplexity and KL on.")
    ] = None
    card_measure: Annotated[
        bool, typer.Option("--card-measure/--no-card-measure", help="Measure the result where there is a text.")
    ] = True
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048
    seed: Annotated[int, typer.Option(help="Which windows are drawn.")] = 0


@dataclass(frozen=True)
class ChoiceFlags:
    """Which tensors get which scheme."""

    skip: Annotated[list[str] | None, typer.Option(help="Leave linears whose name matches this regex.")] = None
    override: Annotated[list[str] | None, typer.Option(help="'REGEX=SCHEME', as 'down_proj=nf4-asym-g64'.")] = None
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            help="Choose the scheme of each layer: the least predicted KL at so many true bits. Needs text; also a "
            "dry run measures. Options of the scheme are then for the ends alone."
        ),
    ] = None
    candidates: Annotated[
        str | None, typer.Option(metavar="SCHEME,SCHEME,...", help="What --bits-per-weight chooses from.")
    ] = None
    sensitivities: Annotated[
        Path | None,
        typer.Option(help="A file for what --bits-per-weight measured; used again where it is there."),
    ] = None
    lm_head: Annotated[
        str | None,
        typer.Option(
            metavar="[SCHEME]", help="Quantize the output head too: as the rest, or as SCHEME (int8-sym-g64)."
        ),
    ] = None
    embedding: Annotated[
        str | None,
        typer.Option(metavar="[SCHEME]", help="Quantize the embedding of tokens too; where tied, it is the head."),
    ] = None


@dataclass(frozen=True)
class RunFlags:
    """How the run goes."""

    end_pass: Annotated[
        int,
        typer.Option(help="Steps of tuning all scales, norms and biases at the end, towards the original; try 200."),
    ] = 0
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Mixtures: each expert learns from all tokens, not only its own.")
    ] = False
    device: DeviceOption = "auto"
    threads: ThreadsOption = None
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on where a stopped run was.")] = True
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it takes.")] = False
    json: JsonOption = None
    trust_remote_code: TrustOption = False


@command(cls=WithBareOptions, epilog="\n\n".join(f"{name}: {method.summary}" for name, method in METHODS.items()))
@with_flags(options=option_parameters(option_types()))
def quantize(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The directory to create.")],
    context: typer.Context,
    scheme: SchemeFlags,
    text: TextFlags,
    choice: ChoiceFlags,
    options: dict[str, Any],
    run: RunFlags,
) -> None:
    """Quantize a checkpoint into a new directory, a block at a time."""
    recipe = _recipe(scheme, choice, options, run)  # a mistake in it needs no imports
    refuse_idle(given_options(context), _idle(recipe, text, choice, run))

    from afpq.commands.console import (
        choice_json,
        outcome_json,
        plan_json,
        print_advice,
        print_estimate,
        print_outcome,
        print_plan,
    )
    from afpq.jobs.bit_budget import make_budget
    from afpq.jobs.estimate import estimate
    from afpq.jobs.prepare import CalibrationSettings
    from afpq.jobs.quantize_checkpoint import Request, run_request

    settings = CalibrationSettings(text.samples, text.seq_len, text.seed, run.device, run.all_experts)
    check_json_place(run.json)
    use_threads(run.threads)
    budget = make_budget(choice.bits_per_weight, None if choice.candidates is None else choice.candidates.split(","))
    request = Request(
        model=model,
        out=out,
        recipe=recipe,
        texts=_texts(text),
        settings=settings,
        budget=budget,
        sensitivities=choice.sensitivities,
        resume=run.resume,
        trust_remote_code=run.trust_remote_code,
    )
    with quiet_transformers(), progress_bar("start") as advance:
        job, outcome = run_request(request, advance, run.dry_run, note)
    print_plan(job, "would write" if outcome is None else "wrote", out)
    if outcome is None:
        print_estimate(estimate(job.plan, None if job.windows is None else (len(job.windows), job.windows.shape[1])))
    else:
        print_outcome(outcome)
    print_advice(job, outcome)
    save_json(run.json, {**plan_json(job.plan), **choice_json(job.choice, job.plan), **outcome_json(outcome)})


def _idle(recipe: Recipe, text: TextFlags, choice: ChoiceFlags, run: RunFlags) -> dict[str, str]:
    """Map each option that has no effect in this run, whether it was given or not, to the reason."""
    return idle_options(
        Use(
            method=recipe.method,
            budget=choice.bits_per_weight is not None,
            end_pass=recipe.end_pass > 0,
            text=text.text is not None or text.dataset is not None,
            dataset=text.dataset is not None,
            eval_text=text.eval_text is not None,
            measure=text.card_measure,
            same_ends=SAME in (choice.lm_head, choice.embedding),
            device=run.device,
        )
    )


def _recipe(flags: SchemeFlags, choice: ChoiceFlags, options: dict[str, Any], run: RunFlags) -> Recipe:
    scheme = Scheme(parse_format(flags.format), flags.group_size, flags.sym, flags.scale_dtype)
    return Recipe(
        scheme,
        flags.method,
        scale_search=flags.scale_search,
        skip=tuple(choice.skip or ()),
        overrides=tuple(_parse_override(pair) for pair in choice.override or []),
        options=options_of(flags.method, options),
        lm_head=scheme_of_end(choice.lm_head, scheme),
        embedding=scheme_of_end(choice.embedding, scheme),
        end_pass=run.end_pass,
    )


def _texts(flags: TextFlags) -> Texts:
    """Read the calibration text, and the text to measure on: a file, or the test split of the dataset calibrated on."""
    from afpq.evaluation.text import read_text
    from afpq.jobs.prepare import Texts

    file, dataset, test_file = flags.text, flags.dataset, flags.eval_text
    given = file is not None or dataset is not None
    test, test_name = None, ""
    content = read_text(file, dataset, calibration=True) if given else None
    if test_file is not None:
        test, test_name = read_text(test_file, None), test_file.name
    elif dataset is not None and flags.card_measure:
        test, test_name = read_text(None, dataset), f"{dataset}'s test split"
    name = file.name if file is not None else f"{dataset}'s training split"
    return Texts(content, test, name, test_name, flags.card_measure)


def _parse_override(text: str) -> tuple[str, Scheme]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator or not pattern:
        raise AfpqError(f"override {text!r}: expected REGEX=SCHEME, for example '.*down_proj=nf4-asym-g64'")
    return pattern, parse_scheme(scheme)
