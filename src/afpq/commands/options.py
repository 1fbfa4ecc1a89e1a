# SPDX-License-Identifier: MIT
"""The application that commands register with, and the options that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from afpq.recipe import SAME

app = typer.Typer(
    help="Make large language models small: 2- to 4-bit weights with a scale for each sign (AFPQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would drop what stands in brackets, as in afpq[eval]
)

ModelArgument = Annotated[str, typer.Argument(help="A directory, or the id of a model on the hub.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
TextOption = Annotated[Path | None, typer.Option("--text", help="A UTF-8 text file.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="wikitext2, ptb or c4 (needs afpq[eval]).")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")]


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
