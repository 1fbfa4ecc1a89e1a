# SPDX-License-Identifier: MIT
"""The page of a comparison: well-formed, escaped, whole without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparisons import HALF, ORIGINAL, TWO, ZERO

from afpq.comparison.cells import Cell
from afpq.comparison.distributions import BINS, Asymmetry
from afpq.comparison.html_page import page
from afpq.comparison.rows import HEADER, About

BAD = "<script>alert('a') & \"b\"</script>"
ABOUT = About(BAD, BAD, (6, 100), BAD, BAD, 0.5, (BAD,))
GROUPS = [Asymmetry(64, (1,) * BINS, 0.25)]


class Elements(HTMLParser):
    """Every element by name, its text, and that each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))


def make() -> str:
    return page(BAD, [BAD], ABOUT, [ORIGINAL, TWO, HALF, ZERO], GROUPS)


def test_the_page_needs_no_network() -> None:
    html = make()
    assert not any(word in html for word in ("http", "@import", "url(", "src=", "<link"))
    assert html.startswith("<!doctype html>")


def test_every_name_is_escaped() -> None:
    odd = replace(TWO, cell=Cell('a<b>&"c', "<i>"))
    elements = Elements(page(BAD, [BAD], ABOUT, [ORIGINAL, odd], GROUPS))
    assert [tag for tag, _ in elements.found].count("script") == 1  # the page's own
    assert not {"b", "i"} & {tag for tag, _ in elements.found}
    texts = [text for _, text in elements.texts]
    assert BAD in texts and 'a<b>&"c' in texts and "<i>" in texts


def test_the_table_has_all_cells_and_sorts_by_numbers() -> None:
    elements = Elements(make())
    assert [text for tag, text in elements.texts if tag == "button"] == [t.strip() for t in HEADER]
    assert HEADER[HEADER.index("true bits") + 1].startswith("KL")
    values = [attributes["data-v"] for tag, attributes in elements.found if tag == "td" and "data-v" in attributes]
    assert {"16.000", "3.250", "3.148", "31.0"} <= set(values)
    classes = [attributes.get("class") for tag, attributes in elements.found if tag == "tr"]
    assert classes.count("front") == 2


def test_every_chart_has_a_name_and_every_mark_a_tooltip() -> None:
    elements = Elements(make())
    charts = [attributes for tag, attributes in elements.found if tag == "svg" and "aria-label" in attributes]
    assert len(charts) == 3 and all(chart["aria-label"] for chart in charts)
    tips = [text for tag, text in elements.texts if tag == "title"]
    assert sum(text.startswith("nf3-asym-g128 rtn: 3.250 bits") for text in tips) == 2
    assert sum("% of groups" in text for text in tips) == BINS


def test_light_and_dark() -> None:
    assert "prefers-color-scheme: dark" in make() and "color-scheme: light dark" in make()


def test_a_comparison_with_nothing_but_the_float_model() -> None:
    elements = Elements(page("t", [], ABOUT, [ORIGINAL], []))
    assert [text for tag, text in elements.texts if tag == "h2"] == ["All cells", "How it was measured"]


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<iframe src="page.html" style="width: 390px; height: 800px; border: 0"></iframe><script>
onload = () => { const page = document.querySelector("iframe").contentDocument;
  const tables = [...page.querySelectorAll("table")], head = t => [...t.tHead.rows[0].cells];
  const right = t => Math.max(...[...t.rows].map(row => row.cells[head(t).findIndex(cell =>
    cell.textContent.startsWith("KL"))].getBoundingClientRect().right));
  document.title = "edges " + tables.map(right).join(" ") + " of " + page.documentElement.scrollWidth;
};</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_telephone_shows_the_kl_without_scrolling(tmp_path: Path) -> None:
    scheme = "learned3-asym-g128-log8"
    wide = [replace(TWO, cell=Cell(scheme, "awq+gptq")), replace(HALF, cell=Cell("nf4-sym-g64-float32", "tune"))]
    html = page("A model", ["A finding."], ABOUT, [ORIGINAL, TWO, HALF, ZERO, *wide], GROUPS)
    (tmp_path / "page.html").write_text(html, "utf-8")
    (tmp_path / "frame.html").write_text(MEASURE, "utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>edges ([\d.]+) ([\d.]+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    cells, pairs, whole = map(float, found.groups())
    assert cells <= 390 and pairs <= 390 and whole <= 390
