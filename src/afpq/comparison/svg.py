# SPDX-License-Identifier: MIT
"""Small charts as SVG: marks over two axes, bars, and grids of shaded squares.

Colours come from classes (`c0`, `c1`, ...) and `currentColor`, so the page decides them, light or dark. Every mark has
a <title>, which browsers show as a tooltip and screen readers read. Matplotlib, an optional package, would draw the
axes, but place no labels, and its SVG has neither of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

LETTER = 6.1  # width of a letter of a label, in the units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 36  # room around the plot
Box = tuple[float, float, float, float]  # left, top, right, bottom
LABEL_PLACES = (  # around the mark, best first
    (8, 3.5, "start"), (-8, 3.5, "end"), (0, -9, "middle"), (0, 15, "middle"),
    (6, -7, "start"), (-6, -7, "end"), (6, 14, "start"), (-6, 14, "end"),
)  # fmt: skip
_CIRCLE = "M-4.4 0a4.4 4.4 0 1 0 8.8 0a4.4 4.4 0 1 0-8.8 0Z"
SHAPES = {
    "dot": _CIRCLE, "ring": _CIRCLE, "square": "M-4-4h8v8h-8Z", "triangle": "M0-5L5 4H-5Z", "swatch": "M-7-3H7V3H-7Z",
}  # fmt: skip
STRONGEST = 2.0  # a heat map is strongest at this many times the mean, and weakest at the mean divided by it


@dataclass(frozen=True)
class Mark:
    """A measured point with the half length of its error bar; `colour` is a class, `tip` the tooltip."""

    x: float
    y: float
    error: float
    label: str
    tip: str
    colour: str
    shape: str


@dataclass(frozen=True)
class _Frame:
    """A plot's axes: data -> drawing."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (self.width - LEFT - RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (*self.y_range, value))
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low)


def scatter(
    marks: Sequence[Mark],
    title: str,
    axes: tuple[str, str],
    front: Sequence[tuple[float, float]] = (),
    level: tuple[float, str] | None = None,
    log: bool = False,
) -> Markup:
    """Draw marks with error bars, a staircase through `front`, a dashed line at `level`; `log`: y > 0, logarithmic."""
    xs = [m.x for m in marks]
    ys = [y for m in marks for y in (m.y - m.error, m.y + m.error) if not log or y > 0] + [m.y for m in marks]
    ys += [level[0]] if level else []
    y_range = (min(ys) / 1.25, max(ys) * 1.35) if log else _padded(min(ys), max(ys))
    frame = _Frame(400, 300, _padded(min(xs), max(xs)), y_range, log)
    svg = _svg(frame.width, frame.height, title)
    _add_axes(svg, frame, axes)
    if level:
        y = frame.y(level[0])
        _add(svg, "path", class_="level", d=f"M{LEFT} {y:.1f}H{frame.width - RIGHT}")
        _add_text(svg, LEFT + 4, y - 4, level[1], "start")
    corners = [(frame.x(x), frame.y(y)) for x, y in front]
    if corners:
        steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
        _add(svg, "path", class_="front", d=f"M{corners[0][0]:.1f} {corners[0][1]:.1f}{steps}")
    placed = [(frame.x(m.x), frame.y(m.y)) for m in marks]
    for mark, (x, y) in zip(marks, placed):
        group = _add(svg, "g", mark.tip, class_=mark.colour)
        if mark.error:
            low = frame.y(max(mark.y - mark.error, frame.y_range[0]))
            _add(group, "path", class_="error", d=f"M{x:.1f} {low:.1f}V{frame.y(mark.y + mark.error):.1f}")
        _add_shape(group, mark.shape, x, y)
    for mark, (x, y, anchor) in _labels(marks, placed, corners, frame):
        _add_text(svg, x, y, mark.label, anchor).set("class", f"name {mark.colour}")
    return _markup(svg)


def bars(counts: Sequence[float], title: str, ticks: Sequence[tuple[float, str]], tips: Sequence[str]) -> Markup:
    """Draw bars side by side from zero; ticks (place in bars from the left, text) below."""
    width, height, floor = 280.0, 130.0, 110.0
    each, tallest = (width - 8) / len(counts), max(*counts, 1e-300)
    svg = _svg(width, height, title)
    for index, (count, tip) in enumerate(zip(counts, tips)):
        tall = (floor - 8) * count / tallest
        place = {"x": 4 + index * each, "y": floor - tall, "width": max(each - 1.2, 0.6), "height": tall}
        _add(svg, "rect", tip, class_="bar", **place)
    _add(svg, "path", class_="axis", d=f"M4 {floor}H{width - 4}")
    for where, text in ticks:
        x = 4 + where * each
        _add_text(svg, x, floor + 14, text, "start" if x < 20 else "end" if x > width - 20 else "middle")
    return _markup(svg)


def heat(
    rows: Sequence[tuple[str, Sequence[float | None]]], title: str, tip: Callable[[str, int, float], str]
) -> Markup:
    """Draw a square for each value, strong above the mean; None leaves a gap. `tip`: (row, column, value) -> text."""
    left, width, each = 96.0, 280.0, 14.0
    columns = max(len(values) for _, values in rows)
    step, height = (width - left) / columns, each * len(rows) + 18
    known = [v for _, values in rows for v in values if v is not None]
    mean = sum(known) / max(len(known), 1) or 1.0
    svg = _svg(width, height, title)
    for line, (name, values) in enumerate(rows):
        _add_text(svg, left - 5, each * line + 10.5, name, "end")
        for column, value in enumerate(values):
            if value is None:
                continue
            place = math.log(max(value / mean, 1e-9)) / math.log(STRONGEST)  # -1 to 1 if it is not cut off
            box = {"x": left + column * step, "y": each * line, "width": step * 0.94, "height": each - 1}
            shade = f"{0.54 + 0.46 * min(max(place, -1), 1):.2f}"
            _add(svg, "rect", tip(name, column, value), class_="bar", fill_opacity=shade, **box)
    _add_text(svg, left, height - 5, "block 0", "start")
    if columns > 1:
        _add_text(svg, width, height - 5, str(columns - 1), "end")
    return _markup(svg)


def shape_sample(shape: str, colour: str) -> Markup:
    """Draw a mark alone, or its colour if the shape is "swatch", for a legend; hidden from screen readers."""
    svg = Element("svg", {"class": f"sample {colour}", "viewBox": "0 0 14 14", "aria-hidden": "true"})
    _add_shape(svg, shape, 7, 7)
    return _markup(svg)


def _svg(width: float, height: float, title: str) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": title})
    SubElement(svg, "title").text = title
    return svg


def _markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))


def _add(parent: Element, tag: str, tip: str = "", **attributes: str | float) -> Element:
    """Add an element with its tooltip; numbers to one digit, `class_` and `fill_opacity` for names Python lacks."""
    texts = {name: v if isinstance(v, str) else f"{v:.1f}" for name, v in attributes.items()}
    element = SubElement(parent, tag, {name.rstrip("_").replace("_", "-"): text for name, text in texts.items()})
    if tip:
        SubElement(element, "title").text = tip
    return element


def _add_text(parent: Element, x: float, y: float, text: str, anchor: str) -> Element:
    element = _add(parent, "text", x=x, y=y, text_anchor=anchor)
    element.text = text
    return element


def _add_shape(parent: Element, shape: str, x: float, y: float) -> None:
    kind = "ring" if shape == "ring" else "mark"
    _add(parent, "path", class_=kind, transform=f"translate({x:.1f} {y:.1f})", d=SHAPES[shape])


def _add_axes(svg: Element, frame: _Frame, names: tuple[str, str]) -> None:
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    for value in _ticks(*frame.x_range):
        _add_text(svg, frame.x(value), floor + 15, f"{value:g}", "middle")
        _add(svg, "path", class_="grid", d=f"M{frame.x(value):.1f} {TOP}V{floor}")
    for value in _log_ticks(*frame.y_range) if frame.log else _ticks(*frame.y_range):
        _add_text(svg, LEFT - 5, frame.y(value) + 3.5, f"{value:g}", "end")
        _add(svg, "path", class_="grid", d=f"M{LEFT} {frame.y(value):.1f}H{right}")
    _add(svg, "path", class_="axis", d=f"M{LEFT} {TOP}V{floor}H{right}")
    _add_text(svg, (LEFT + right) / 2, frame.height - 5, names[0], "middle")
    _add_text(svg, LEFT + 4, TOP + 2, names[1], "start")


def _labels(
    marks: Sequence[Mark], placed: Sequence[tuple[float, float]], corners: Sequence[tuple[float, float]], frame: _Frame
) -> Iterator[tuple[Mark, tuple[float, float, str]]]:
    """Give names a place next to their marks while there is room, in the marks' order; tips and table name the rest.

    Places clear of the staircase come first, then any that lie on no mark and no other name.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in placed]
    taken.append((LEFT, 0, LEFT + 70, TOP + 6))  # the name of the axis
    stairs: list[Box] = []
    for (x, y), (right, below) in pairwise(corners):
        stairs += [(x, y - 1, right, y + 1), (right - 1, y, right + 1, below)]
    for mark, (x, y) in zip(marks, placed):
        found = _free_place(mark.label, x, y, [*taken, *stairs], frame) or _free_place(mark.label, x, y, taken, frame)
        if found is not None:
            taken.append(found[0])
            yield mark, found[1]


def _free_place(
    label: str, x: float, y: float, taken: Sequence[Box], frame: _Frame
) -> tuple[Box, tuple[float, float, str]] | None:
    """Return the first place around (x, y) at which a label overlaps nothing that is taken: its box; x, y, anchor."""
    wide = LETTER * len(label)
    for dx, dy, anchor in LABEL_PLACES:
        begin = x + dx - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
        box = (begin, y + dy - 9, begin + wide, y + dy + 2)
        inside = box[0] > LEFT and box[2] < frame.width and box[1] > 0 and box[3] < frame.height - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box, (x + dx, y + dy, anchor)
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Return four to nine round numbers between the two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (5, 2.5, 2, 1) if step * factor * 3.5 <= high - low)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    return [float(f"{value:.3g}") for value in found if low <= value <= high]
