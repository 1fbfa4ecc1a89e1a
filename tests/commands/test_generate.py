# SPDX-License-Identifier: MIT
"""`afpq generate` from the command line: text as it is, drawn or not, from standard input, and chats."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
from command_line import Cli, assert_refused, finish, start
from command_line import cli as cli  # the fixtures
from command_line import packed as packed

from afpq.evaluation.loading import load_tokenizer
from afpq.kernels import set_compute

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<A>' if add_generation_prompt }}"
FEW = ("--max-new-tokens", "3")


@pytest.fixture(scope="module")
def talker(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed model with a chat template."""
    place = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(packed, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


class Keyboard(io.StringIO):
    """Lines that are typed at a terminal."""

    def isatty(self) -> bool:
        return True


def test_generate_prints_text_as_it_is(cli: Cli, packed: Path) -> None:
    prompt = "[bold]a[/bold] [/x] :smile: " + "long " * 15
    result = cli("generate", packed, prompt, "--max-new-tokens", "3")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(prompt)
    assert cli("generate", packed, prompt, "--max-new-tokens", "3") == result


def test_generate_in_either_arithmetic(cli: Cli, packed: Path) -> None:
    """A random model of one token after the other: int8 may choose others, but says something."""
    try:
        assert cli("generate", packed, "a", "--max-new-tokens", "3", "--compute", "int8").code == 0
    finally:
        assert set_compute("exact") == "int8"


@pytest.mark.parametrize(
    "options",
    [
        [""],
        ["a", "--max-new-tokens", "0"],
        ["a", "--max-new-tokens", "x"],
        ["a", "--compute", "int4"],
        ["a", "--device", "abacus"],
        ["a", "--temperature", "-1"],
        ["a", "--temperature", "nan"],
        ["a", "--temperature", "1", "--top-p", "0"],
        ["a", "--temperature", "1", "--top-p", "1.5"],
        ["a", "--temperature", "1", "--seed", "-1"],
        ["a", "--top-p", "0.9"],
        ["a", "--seed", "1"],
        ["a", "--system", "Be short."],
        ["a", "--chat"],
        ["b" * 128],
        ["\udcff"],
    ],
)
def test_bad_options_of_generate(cli: Cli, packed: Path, options: list[str]) -> None:
    assert_refused(cli("generate", packed, *options))


def test_a_prompt_from_standard_input(cli: Cli, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cli("generate", packed, "two\nlines", *FEW)
    assert expected.code == 0
    for words, content in (([], "two\nlines\n"), (["-"], "two\nlines"), (["-"], "two\nlines\r\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content))
        found = cli("generate", packed, *words, *FEW)
        assert found == (expected if "\r" not in content else found) and found.code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(cli("generate", packed, *FEW), "the prompt is empty")
    monkeypatch.setattr(sys, "stdin", Keyboard("never read"))
    assert_refused(cli("generate", packed, *FEW), "no prompt", "--chat")


def test_the_same_seed_draws_the_same(cli: Cli, packed: Path) -> None:
    options = ("--temperature", "2", "--top-p", "0.95", "--max-new-tokens", "16")
    first, second, third = (cli("generate", packed, "a", *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first.code == 0 and first == second != third
    # a nucleus of one token is greedy
    greedy = cli("generate", packed, "a", *FEW)
    assert cli("generate", packed, "a", *FEW, "--temperature", "5", "--top-p", "1e-9") == greedy


def test_a_chat_is_the_models_template(cli: Cli, packed: Path, talker: Path) -> None:
    """The answer alone is printed: what follows the text that the template makes."""
    filled = "<system>Be short.<user>Hi<A>"
    whole = cli("generate", packed, filled, *FEW)
    answer = cli("generate", talker, "Hi", "--chat", "--system", "Be short.", *FEW)
    assert answer.code == 0 and answer.err == "" and whole.out == filled + answer.out


def test_turns_at_a_terminal(cli: Cli, packed: Path, talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("Hi\n\nMore\n"))
    result = cli("generate", talker, "--chat", *FEW)
    assert result.code == 0
    first = cli("generate", packed, "<user>Hi<A>", *FEW).out.removeprefix("<user>Hi<A>").removesuffix("\n")
    filled = f"<user>Hi<assistant>{first}<user>More<A>"
    second = cli("generate", packed, filled, *FEW).out.removeprefix(filled).removesuffix("\n")
    assert result.out == f"> {first}\n> > {second}\n> \n"


def test_a_chat_that_is_not_possible(cli: Cli, packed: Path, tmp_path: Path) -> None:
    assert_refused(cli("generate", packed, "Hi", "--chat"), "no chat template")
    shutil.copytree(packed, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    assert_refused(cli("generate", tmp_path / "model", "Hi", "--chat"), "template refuses", "no system role")


def test_text_comes_as_it_is_made(packed: Path) -> None:
    """As a process whose output is a pipe: the prompt is there before the last token."""
    process = start("generate", packed, "Once", "--max-new-tokens", "100")
    assert process.stdout is not None
    assert process.stdout.read(4) == "Once"
    assert process.poll() is None
    rest = finish(process)
    assert rest.code == 0 and len(load_tokenizer(packed)(rest.out)["input_ids"]) > 50
