# SPDX-License-Identifier: MIT
"""Charts: well-formed XML, every mark inside the drawing, names that do not lie on each other."""

from __future__ import annotations

import math
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afpq.comparison.svg import LETTER, SHAPES, Mark, _log_ticks, _ticks, bars, heat, scatter

NUMBERS = st.floats(0.001, 1e6)


def mark(x: float, y: float, error: float = 0.0, label: str = "a < b & c", shape: str = "dot") -> Mark:
    return Mark(x, y, error, label, f'"{label}"', "c0", shape)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.booleans())
def test_marks_lie_inside_the_drawing(points: list[tuple[float, float]], log: bool) -> None:
    marks = [mark(x, y, 0.3 * y, shape=list(SHAPES)[i % 4]) for i, (x, y) in enumerate(points)]
    root = parse(scatter(marks, "A & B", ("x", "y"), points, (1.0, "level"), log))
    width, height = (float(text) for text in root.attrib["viewBox"].split()[2:])
    places = re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)", ElementTree.tostring(root, "unicode"))
    assert len(places) == len(points)
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in places)
    assert sum(1 for title in root.iter("title") if title.text == '"a < b & c"') == len(points)


@given(st.lists(st.tuples(st.floats(3, 5), st.floats(1, 50)), min_size=2, max_size=12))
def test_names_do_not_lie_on_each_other(points: list[tuple[float, float]]) -> None:
    svg = scatter([mark(x, y, label=f"name-{i}") for i, (x, y) in enumerate(points)], "t", ("x", "y"))
    boxes = []
    for x, y, anchor, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>(name-\d+)', svg):
        wide = LETTER * len(text)
        begin = float(x) - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
        boxes.append((begin, float(y) - 9, begin + wide, float(y) + 2))
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] + 0.2 or b[2] <= a[0] + 0.2 or a[3] <= b[1] + 0.2 or b[3] <= a[1] + 0.2


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    high = low + width
    ticks = _ticks(low, high)
    assert 3 <= len(ticks) <= 10
    assert all(low - 1e-6 <= tick <= high + 1e-6 for tick in ticks)


@given(NUMBERS, st.floats(1.7, 1e4))
def test_logarithmic_ticks_are_inside(low: float, ratio: float) -> None:
    ticks = _log_ticks(low, low * ratio)
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert ticks or ratio < 2.6


@pytest.mark.parametrize("points", [[(4.0, 0.0)], [(4.0, 2.0), (4.0, 2.0)]], ids=["one", "equal"])
def test_charts_of_hardly_anything(points: list[tuple[float, float]]) -> None:
    parse(scatter([mark(x, y) for x, y in points], "t", ("x", "y")))


def test_bars_are_as_tall_as_their_counts() -> None:
    root = parse(bars([1, 2, 4], "t", [(0.5, "first")], ["a", "b", "c"]))
    heights = [float(rect.attrib["height"]) for rect in root.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2) and heights[2] == pytest.approx(4 * heights[0], abs=0.2)
    assert all(math.isfinite(float(r.attrib["height"])) for r in parse(bars([0, 0], "t", [], ["", ""])).iter("rect"))


def test_a_heat_map_has_a_square_for_each_value_and_gaps_for_none() -> None:
    root = parse(heat([("q", [1.0, None, 0.5]), ("k", [0.0])], "t", lambda row, column, v: f"{row} {column} {v}"))
    tips = [title.text for rect in root.iter("rect") for title in rect.iter("title")]
    assert tips == ["q 0 1.0", "q 2 0.5", "k 0 0.0"]
    parse(heat([("q", [0.0])], "nothing but zeros", lambda row, column, v: ""))
