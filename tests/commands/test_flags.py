# SPDX-License-Identifier: MIT
"""Flags from dataclasses: of a command's groups, and of solvers' options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from afpq.algorithms.methods import METHODS
from afpq.algorithms.solver_options import AwqOptions, GptqOptions, SolverOptions, option
from afpq.commands.flags import option_parameters, options_of, with_flags
from afpq.errors import AfpqError


@dataclass(frozen=True)
class MadeUp(SolverOptions):
    rounds: int = option(4, "MADE UP: how often.")
    careful: bool = option(True, "MADE UP: slow.")
    sweeps: int = option(9, "Another's.")


@dataclass(frozen=True)
class Group:
    """Flags of a command."""

    size: Annotated[int, typer.Option(help="How large.")] = 2
    name: Annotated[str | None, typer.Option("--called", help="A name.")] = None


def invoke(*words: str) -> tuple[dict[str, Any], str]:
    """(what a command with these groups is called with, its output)."""
    found: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_flags(options=option_parameters([GptqOptions, MadeUp]))
    def command(
        place: Annotated[str, typer.Argument(help="A place.")],
        group: Group,
        options: dict[str, Any],
        dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
    ) -> None:
        found.update(place=place, group=group, options=options, dry_run=dry_run)

    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0, result.output
    return found, result.output


def test_a_new_field_is_a_new_flag() -> None:
    found, _ = invoke("here", "--rounds", "7", "--no-careful", "--called", "x", "--damp", "0.5")
    assert (found["place"], found["group"], found["dry_run"]) == ("here", Group(2, "x"), False)
    defaults = {"order": "group", "sweeps": 3, "float_target": True, "sequential": True}  # the first type's `sweeps`
    assert found["options"] == {"damp": 0.5, "rounds": 7, "careful": False, **defaults}


def test_help_is_in_the_order_of_the_function() -> None:
    _, text = invoke("--help")
    words = ["--size", "--called", "--damp", "--order", "--sweeps", "--no-sequential", "--rounds", "--no-careful"]
    places = [text.index(word) for word in [*words, "--dry-run"]]
    assert places == sorted(places) and "MADE UP: how often." in text and "Another's" not in text


def test_a_method_gets_its_own_options() -> None:
    values = {"damp": 0.1, "order": "act", "sweeps": 1, "float_target": False, "sequential": False}
    assert options_of("gptq", values) == GptqOptions(**values)  # type: ignore[arg-type]
    assert options_of("awq", values) == AwqOptions(False)
    assert options_of("rtn", values) == SolverOptions()
    assert options_of("magic", values) is None
    for method in METHODS:
        with pytest.raises(AfpqError, match="damp"):
            options_of(method, values | {"damp": 2.0})
