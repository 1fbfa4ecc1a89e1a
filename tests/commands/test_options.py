# SPDX-License-Identifier: MIT
"""Options that may stand without a value."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from afpq.commands.options import WithBareOptions


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["place"], "place None None"),
        (["place", "--lm-head"], "place same None"),
        (["--lm-head", "--embedding", "int8-sym-g64", "place"], "place same int8-sym-g64"),
        (["place", "--embedding", "--lm-head", "nf4-asym-g64"], "place nf4-asym-g64 same"),
    ],
)
def test_a_bare_option_means_the_same_as_the_rest(words: list[str], found: str) -> None:
    app = typer.Typer()

    @app.command(cls=WithBareOptions)
    def command(
        place: str,
        lm_head: Annotated[str | None, typer.Option()] = None,
        embedding: Annotated[str | None, typer.Option()] = None,
    ) -> None:
        typer.echo(f"{place} {lm_head} {embedding}")

    assert CliRunner().invoke(app, words).output.strip() == found
