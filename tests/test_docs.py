# SPDX-License-Identifier: MIT
"""The documentation is true: every block of code in it runs, outputs look as shown, links lead somewhere.

Python and shell blocks of a page run in order, in one directory that holds what the pages speak of: small models under
the names of MODELS, one that bitsandbytes quantized, `calibration.txt` and `test.txt`. A `text` block right behind
another is its output; numbers may differ, and `...` stands for anything. What cannot run says so in an HTML comment in
front of its block, `<!-- not run: REASON -->`, or `<!-- not run ("START OF A LINE"): REASON -->` for single lines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_layout import Layout, convert
from conftest import TINY, save_tokenizer

from afpq.algorithms.methods import METHODS
from afpq.cli import main
from afpq.kernels import set_compute

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.glob("*.md") if page.name != "LOG.md")]  # a log is history
RUN, SHOWN = {"python", "sh"}, {"text", "json", "yaml", "cpp", "markdown"}
SMALL = {**TINY, "num_hidden_layers": 1, "max_position_embeddings": 32, "initializer_range": 0.05}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # what pages call a model -> its type, a small configuration
    "Qwen/Qwen3-0.6B": ("qwen3", {"head_dim": 16}),
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "openai-community/gpt2": ("gpt2", {}),
}
HEAVY = ("README.md",)  # read with the slow tests only: its `afpq compare` takes a quarter of the time of all pages
BITSANDBYTES = "me/Qwen3-0.6B-bnb-4bit"
MOST_NOT_RUN = 10  # blocks and lines in all pages; raise it knowingly

FENCE = re.compile(r"( *)```(.*)")
MARK = re.compile(r'<!-- not run(?: \("(?P<start>[^"]+)"\))?: (?P<reason>.+) -->')
STARTS_WITH = "<!-- starts with `out` -->"
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, language and text; why it, or lines of it, are not run; the block it is output of."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None = None
    lines_not_run: tuple[tuple[str, str], ...] = ()
    follows: bool = False

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"

    def marks(self) -> list[str]:
        """One text for each mark of something not run."""
        whole = [] if self.reason is None else [self.reason]
        return [f"{self.place}: {reason}" for reason in (*whole, *(reason for _, reason in self.lines_not_run))]


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """All fenced blocks of a page."""
    blocks: list[Block] = []
    marks: list[re.Match[str]] = []
    follows = False  # nothing but blank lines since the last block
    lines = enumerate(iter((text or page.read_text("utf-8")).splitlines()), 1)
    for number, line in lines:
        fence, mark = FENCE.fullmatch(line), MARK.fullmatch(line.strip())
        if fence:
            indent, language = fence.groups()
            inside = []
            for _, each in lines:
                if each.rstrip() == f"{indent}```":
                    break
                inside.append(each.removeprefix(indent))
            else:
                raise AssertionError(f"{page.name}:{number}: this block has no end")
            whole = next((m["reason"] for m in marks if m["start"] is None), None)
            single = tuple((m["start"], m["reason"]) for m in marks if m["start"] is not None)
            blocks.append(Block(page, number, language, "\n".join(inside), whole, single, follows and bool(blocks)))
            marks, follows = [], True
        elif mark:
            marks.append(mark)
            follows = False
        elif line.strip():
            assert not marks, f"{page.name}:{number}: a mark of what is not run stands right in front of its block"
            follows = False
    assert not marks, f"{page.name}: a mark at the end has no block"
    return blocks


def command_lines(block: Block) -> list[list[str]]:
    """The commands of a shell block that run, as words."""
    left = dict(block.lines_not_run)
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        start = next((start for start in left if line.startswith(start)), None)
        words = shlex.split(line, comments=True)
        if start is not None:
            left.pop(start)
        elif words:
            commands.append(words)
    assert not left, f"{block.place}: no line starts with {', '.join(left)}"
    return commands


class Reader:
    """Someone who types all blocks of a page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.output: str | None = None  # of the last block that ran

    def read(self, block: Block) -> None:
        if block.language == "text" and block.follows and self.output is not None:
            assert_alike(block.text, self.output, block.place)
        elif block.language in SHOWN or block.reason is not None:
            self.output = None
        else:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                self._python(block) if block.language == "python" else self._shell(block)
            self.output = shown.getvalue()

    def _python(self, block: Block) -> None:
        code = compile("\n" * block.line + block.text, str(block.page), "exec")  # tracebacks tell the page's line
        exec(code, self.names)

    def _shell(self, block: Block) -> None:
        for words in command_lines(block):
            assert words[0] == "afpq", f"{block.place}: only afpq can be run here; mark the line: {shlex.join(words)}"
            self.monkeypatch.setattr(sys, "argv", words)
            try:
                main()
            except SystemExit as stop:
                assert not stop.code, f"{block.place}: {shlex.join(words)} ended with {stop.code}"


def assert_alike(shown: str, real: str, place: str) -> None:
    """The same lines but for numbers, spaces, and what `...` stands for."""
    pattern = r"\s*".join(".*?".join(map(re.escape, line.split("..."))) for line in _masked(shown))
    if re.fullmatch(pattern, "\n".join(_masked(real)), re.DOTALL) is None:
        raise AssertionError(f"{place}: the output is now\n{real}")


def _masked(text: str) -> list[str]:
    lines = (" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines())
    return [line for line in lines if line]


def save_small(directory: Path, kind: str, changes: dict[str, Any]) -> None:
    """A small random model in float16, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **changes})).half().save_pretrained(
        directory
    )
    save_tokenizer(directory)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory a page starts in, and beside it `out`, the model quantized as Getting started does."""
    import afpq

    place = tmp_path_factory.mktemp("docs")
    start = place / "start"
    for name, (kind, changes) in MODELS.items():
        save_small(start / name, kind, changes)
    save_small(
        start / BITSANDBYTES, "qwen3", {"head_dim": 16, "intermediate_size": 128}
    )  # whole groups, as at real sizes
    convert(start / BITSANDBYTES, Layout())
    (start / "calibration.txt").write_text("Two scales a group of weights.")  # one window: fast
    (start / "test.txt").write_text("What a model has never seen tells what it has learned. " * 4)
    afpq.quantize(start / next(iter(MODELS)), place / "out")
    return place


@pytest.fixture
def reader(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    shutil.copytree(material / "start", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    methods = dict(METHODS)
    yield Reader(monkeypatch)
    METHODS.clear()  # a page adds one
    METHODS.update(methods)
    set_compute("exact")
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:transformers.*")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.name in HEAVY else [], id=page.name) for page in PAGES],
)
def test_every_block_runs(page: Path, reader: Reader, material: Path, tmp_path: Path) -> None:
    if STARTS_WITH in page.read_text("utf-8"):
        shutil.copytree(material / "out", tmp_path / "out")
    for block in blocks_of(page):
        reader.read(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_code_that_runs_or_something_to_look_at(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in RUN | SHOWN, f"{block.place}: {block.language!r} is none of {sorted(RUN | SHOWN)}"
        assert block.language in RUN or not block.marks(), f"{block.place}: marked, but nobody would run it"


def test_little_is_not_run_and_it_says_why() -> None:
    marks = [mark for page in PAGES for block in blocks_of(page) for mark in block.marks()]
    assert len(marks) <= MOST_NOT_RUN, "\n".join(marks)
    assert all(len(mark.split()) > 3 for mark in marks), marks


# ---- the pages among themselves


def hooks() -> Any:
    """docs/hooks.py, which mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def slugify(title: str) -> str:
    """As Python-Markdown does."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*?)(?: \{#([\w-]+)\})?$", text, re.MULTILINE)
    return {given or slugify(title) for title, given in headings}


@pytest.mark.parametrize("page", [*PAGES, DOCS / "LOG.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", without_code(page.read_text("utf-8"))):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r"^ +- .*: (\S+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_every_command_has_its_options_an_example_and_its_output() -> None:
    page = DOCS / "commands.md"
    placed = re.findall(r"<!-- options: (\S+) -->", page.read_text("utf-8"))
    assert sorted(placed) == sorted(hooks().commands())
    examples = [a for a, b in pairwise(blocks_of(page)) if a.language == "sh" and b.language == "text" and b.follows]
    assert {words[1] for example in examples for words in command_lines(example)} == set(placed)


def test_the_tables_of_options_name_all_of_them() -> None:
    table = hooks().command_table("quantize")
    assert "afpq quantize MODEL OUT [OPTIONS]" in table
    assert "| `--format <str>` | `nf4` |" in table
    assert "| `--sym / --asym` | `--asym` |" in table
    for command in hooks().commands().values():
        assert all(parameter.help for parameter in command.params), command.name


@pytest.mark.parametrize(
    ("html", "fetched"),
    [
        ('<script src="https://unpkg.com/a.js"></script>', ["https://unpkg.com/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/css">', ["//fonts.example/css"]),
        ("@font-face { src: url(https://fonts.example/a.woff2) }", ["https://fonts.example/a.woff2"]),
        ("<img alt=x src='http://a.example/b.png'>", ["http://a.example/b.png"]),
        ('<a href="https://arxiv.org">paper</a> <script src="assets/a.js"></script><link rel="canonical">', []),
    ],
)
def test_what_a_browser_would_fetch_elsewhere_is_found(html: str, fetched: list[str]) -> None:
    assert hooks().fetched_addresses(html) == fetched


def test_figures_on_choosing_a_scheme_are_those_of_the_log() -> None:
    figures = re.compile(r"(?<![\d.])\d+\.\d\d+")
    page = without_code((DOCS / "schemes.md").read_text("utf-8"))
    assert set(figures.findall(page)) <= set(figures.findall((DOCS / "LOG.md").read_text("utf-8")))


# ---- the harness itself


def test_marks_and_outputs_belong_to_their_blocks() -> None:
    page = (
        "<!-- not run: no network -->\n```sh\na\n```\n\n```text\nb\n```\n\n"
        '<!-- not run ("x y"): why -->\n```sh\nx y z\nafpq\n```'
    )
    first, output, last = blocks_of(Path("page.md"), page)
    assert (first.reason, first.line, output.follows, last.reason, last.follows) == ("no network", 2, True, None, False)
    assert command_lines(last) == [["afpq"]]
    with pytest.raises(AssertionError, match="right in front"):
        blocks_of(Path("page.md"), "<!-- not run: why -->\nprose\n")
    with pytest.raises(AssertionError, match="no line starts"):
        command_lines(Block(Path("page.md"), 1, "sh", "afpq", None, (("pip", "why"),)))


def test_outputs_may_differ_in_numbers_only() -> None:
    assert_alike("files   2.16 MB", "files 3.0 MB\n", "here")
    assert_alike("a\n...\nz 1", "a\nb\nc\n\nz 2", "here")
    assert_alike("once ... (end)", "once upon a time (end)", "here")
    for other in ("file 2 MB", "files 2 MB\nmore", ""):
        with pytest.raises(AssertionError, match="here"):
            assert_alike("files 2 MB", other, "here")


def test_code_of_a_page_that_fails_is_a_failure(reader: Reader) -> None:
    for language, text in (("python", "assert 1 == 2"), ("sh", "afpq info nowhere"), ("sh", "rm x")):
        with pytest.raises(AssertionError):
            reader.read(Block(Path("page.md"), 1, language, text))
