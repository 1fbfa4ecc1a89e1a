# SPDX-License-Identifier: MIT
"""Words of messages: numbers with their nouns, one thing at a time, and no bracket of a help text lost."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture
from hypothesis import given
from hypothesis import strategies as st

import afpq
from afpq import AfpqError, CalibrationSettings, GptqOptions
from afpq.commands.application import COMMANDS
from afpq.commands.options import app
from afpq.errors import counted, in_all
from afpq.evaluation.benchmarks import TaskOptions
from afpq.evaluation.inspection import InspectSettings

SOURCE = Path(afpq.__file__).parent
NOUNS = "tensor|linear|layer|window|sample|weight|unit|file|code book|document|task"


@given(st.integers(0, 10**9))
def test_a_number_and_its_noun_agree(count: int) -> None:
    assert counted(count, "tensor") == f"{count:,} tensor{'' if count == 1 else 's'}"


def test_the_rest_of_a_list_is_named_if_there_is_one() -> None:
    assert f"lacks a.weight{in_all(1, 'tensor')}" == "lacks a.weight"
    assert f"lacks a.weight{in_all(3, 'tensor')}" == "lacks a.weight (3 tensors in all)"


def test_no_message_has_a_fixed_plural_in_brackets() -> None:
    """The list that an error stands for is `in_all`, which is empty for one."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr) and file.name != "errors.py":
                text = "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                assert not re.search(rf"\{{\}} (?:{NOUNS})s in all", text), (file, text)


@pytest.mark.parametrize(
    ("make", "named", "other"),
    [
        (lambda: GptqOptions(damp=2), "damp 2", "sweeps"),
        (lambda: GptqOptions(sweeps=-1), "sweeps -1", "damp"),
        (lambda: CalibrationSettings(samples=0), "samples 0", "2048"),
        (lambda: CalibrationSettings(seq_len=1), "sequence length 1", "128"),
        (lambda: InspectSettings(rows=0), "rows 0", "layers"),
        (lambda: TaskOptions(limit=0), "limit 0", "batch"),
        (lambda: TaskOptions(num_fewshot=-1), "num fewshot -1", "limit"),
    ],
)
def test_an_error_is_about_one_thing(make: Callable[[], Any], named: str, other: str) -> None:
    with pytest.raises(AfpqError) as error:
        make()
    assert str(error.value).startswith(named) and other not in str(error.value)


@pytest.mark.parametrize("name", sorted(c.name or c.callback.__name__ for c in app.registered_commands if c.callback))
def test_help_shows_each_text_as_it_is_written(cli: Cli, name: str) -> None:
    assert COMMANDS
    shown = " ".join(cli(name, "--help").out.split())
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        if getattr(parameter, "help", None) and not parameter.hidden:
            assert " ".join(parameter.help.split()) in shown, parameter.name


def test_a_head_that_is_missing_is_one_tensor(cli: Cli, tiny_copy: Path, tmp_path: Path) -> None:
    from conftest import edit_weights

    edit_weights(tiny_copy, lambda tensors: tensors.pop("lm_head.weight"))
    result = cli("quantize", tiny_copy, tmp_path / "out")
    assert_refused(result, "the checkpoint lacks lm_head.weight")
    assert "in all" not in result.err
