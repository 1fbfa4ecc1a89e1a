# SPDX-License-Identifier: MIT
"""The application that commands register with, and the options that several of them take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from afpq.commands.output import choose_output, results
from afpq.recipe import SAME
from afpq.version import __version__

app = typer.Typer(
    help="Make large language models small: 2- to 4-bit weights with a scale for each sign (AFPQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would drop what stands in brackets, as in afpq[eval]
)

ModelArgument = Annotated[str, typer.Argument(help="A directory, or the id of a model on the hub.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the result to this JSON file; -: to standard output, alone.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", help="Threads of the CPU. [default: torch's choice]")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
TextOption = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="wikitext2, ptb or c4 (needs afpq[eval]).")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]


VerboseOption = Annotated[bool, typer.Option("--verbose", help="A line for every finished unit of work.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Only errors, and the result or the line with its path.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        results.print(f"afpq {__version__}")
        raise typer.Exit


@app.callback()
def before_a_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    choose_output(verbose, quiet)


Function = Callable[..., None]


def with_signature(function: Function, parameters: Sequence[inspect.Parameter]) -> Function:
    """Let a function that takes any keywords have these parameters for Typer, which reads both places."""
    setattr(function, "__signature__", inspect.Signature(parameters))  # noqa: B010  (mypy refuses the attribute)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def command(name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
    """Register a function as a command of `app` that takes `--verbose` and `--quiet` besides its own options."""

    def register(function: Function) -> Function:
        given, hints = inspect.signature(function), get_type_hints(function, include_extras=True)
        own = [part.replace(annotation=hints[part.name]) for part in given.parameters.values()]
        added = [
            inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for word, kind in (("verbose", VerboseOption), ("quiet", QuietOption))
        ]

        @wraps(function)
        def run(*, verbose: bool, quiet: bool, **values: Any) -> None:
            choose_output(verbose, quiet)
            function(**values)

        return app.command(name, **settings)(with_signature(run, [*own, *added]))

    return register


class WithBareOptions(TyperCommand):
    """A command whose options BARE may stand without a value, which then is "same"; Typer has no such options.

    One stands bare if it is last, or before another option; so `--lm-head` goes behind MODEL and OUT, or has a value.
    """

    BARE = ("--lm-head", "--embedding")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for word, following in zip(args, [*args[1:], "-"]):
            given += [word, SAME] if word in self.BARE and following.startswith("-") else [word]
        return super().parse_args(ctx, given)
