# SPDX-License-Identifier: MIT
"""The page of a comparison: well-formed, escaped, whole without a network."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

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
