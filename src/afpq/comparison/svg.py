# SPDX-License-Identifier: MIT
"""Small charts as SVG text: marks over two axes, bars, and grids of shaded squares.

Colours come from classes (`c0`, `c1`, ...) and `currentColor`, so the page around decides them, light or dark. Every
mark has a <title>, which browsers show as a tooltip and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LETTER = 6.1  # width of a letter of a label, in the units of the drawing
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 36  # room around the plot
Box = tuple[float, float, float, float]  # left, top, right, bottom
SHAPES = ("dot", "ring", "square", "triangle")
PLACES = (  # of a label around its mark, best first
    (8, 3.5, "start"), (-8, 3.5, "end"), (0, -9, "middle"), (0, 15, "middle"),
    (6, -7, "start"), (-6, -7, "end"), (6, 14, "start"), (-6, 14, "end"),
)  # fmt: skip
FACTOR = 2.0  # a heat map is strongest at this many times the mean, and weakest at the mean divided by it


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
) -> str:
    """Marks with error bars, a staircase through `front`, a dashed line at `level`; `log`: y > 0, logarithmic."""
    xs = [m.x for m in marks]
    ys = [y for m in marks for y in (m.y - m.error, m.y + m.error) if not log or y > 0] + [m.y for m in marks]
    ys += [level[0]] if level else []
    frame = _Frame(400, 300, _padded(min(xs), max(xs)), _log_padded(ys) if log else _padded(min(ys), max(ys)), log)
    parts = [*_axes(frame, axes)]
    if level:
        y = frame.y(level[0])
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{frame.width - RIGHT}"/>')
        parts.append(_text(LEFT + 4, y - 4, level[1], "start"))
    corners = [(frame.x(x), frame.y(y)) for x, y in front]
    if front:
        steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
        parts.append(f'<path class="front" d="M{corners[0][0]:.1f} {corners[0][1]:.1f}{steps}"/>')
    placed = [(frame.x(m.x), frame.y(m.y)) for m in marks]
    for mark, (x, y) in zip(marks, placed):
        low = frame.y(max(mark.y - mark.error, frame.y_range[0]))
        bar = f'<path class="error" d="M{x:.1f} {low:.1f}V{frame.y(mark.y + mark.error):.1f}"/>' if mark.error else ""
        parts.append(f'<g class="{mark.colour}"><title>{escape(mark.tip)}</title>{bar}{_shape(mark.shape, x, y)}</g>')
    parts += _labels(marks, placed, corners, frame)
    return _svg(frame.width, frame.height, title, parts)


def bars(counts: Sequence[float], title: str, ticks: Sequence[tuple[float, str]], tips: Sequence[str]) -> str:
    """Bars side by side from zero; ticks (place in bars from the left, text) below."""
    width, height, floor = 280.0, 130.0, 110.0
    each, top = (width - 8) / len(counts), max(*counts, 1e-300)
    parts = []
    for index, (count, tip) in enumerate(zip(counts, tips)):
        tall = (floor - 8) * count / top
        corner = f'x="{4 + index * each:.1f}" y="{floor - tall:.1f}"'
        box = f'{corner} width="{max(each - 1.2, 0.6):.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(tip)}</title></rect>')
    parts.append(f'<path class="axis" d="M4 {floor}H{width - 4}"/>')
    for place, text in ticks:
        x = 4 + place * each
        anchor = "start" if x < 20 else "end" if x > width - 20 else "middle"
        parts.append(_text(x, floor + 14, text, anchor))
    return _svg(width, height, title, parts)


def heat(rows: Sequence[tuple[str, Sequence[float | None]]], title: str, tip: Callable[[str, int, float], str]) -> str:
    """A square for each value, strong above the mean, weak below; None leaves a gap. `tip`: (row, column, value)."""
    left, width, each = 96.0, 280.0, 14.0
    columns = max(len(values) for _, values in rows)
    step = (width - left) / columns
    height = each * len(rows) + 18
    known = [v for _, values in rows for v in values if v is not None]
    mean = sum(known) / max(len(known), 1) or 1.0
    parts = []
    for line, (name, values) in enumerate(rows):
        parts.append(_text(left - 5, each * line + 10.5, name, "end"))
        for column, value in enumerate(values):
            if value is None:
                continue
            box = f'x="{left + column * step:.1f}" y="{each * line:.1f}" width="{step * 0.94:.2f}" height="{each - 1}"'
            place = math.log(max(value / mean, 1e-9)) / math.log(FACTOR)  # -1 to 1 where it is not cut off
            shade = f'fill-opacity="{0.54 + 0.46 * min(max(place, -1), 1):.2f}"'
            parts.append(f'<rect class="bar" {box} {shade}><title>{escape(tip(name, column, value))}</title></rect>')
    parts.append(_text(left, height - 5, "block 0", "start"))
    if columns > 1:
        parts.append(_text(width, height - 5, str(columns - 1), "end"))
    return _svg(width, height, title, parts)


def shape_sample(shape: str, colour: str) -> str:
    """A mark alone, or its colour where the shape is "swatch", for a legend; hidden from screen readers."""
    inner = '<rect class="mark" y="4" width="14" height="6" rx="2"/>' if shape == "swatch" else _shape(shape, 7, 7)
    return f'<svg class="sample {colour}" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{inner}</svg>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}"><title>{name}</title>{body}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shape(shape: str, x: float, y: float) -> str:
    if shape == "square":
        return f'<rect class="mark" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if shape == "triangle":
        return f'<path class="mark" d="M{x:.1f} {y - 5:.1f}L{x + 5:.1f} {y + 4:.1f}H{x - 5:.1f}Z"/>'
    return f'<circle class="{"mark" if shape == "dot" else "ring"}" cx="{x:.1f}" cy="{y:.1f}" r="4.4"/>'


def _axes(frame: _Frame, names: tuple[str, str]) -> Iterator[str]:
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    for value in _ticks(*frame.x_range):
        yield _text(frame.x(value), floor + 15, f"{value:g}", "middle")
        yield f'<path class="grid" d="M{frame.x(value):.1f} {TOP}V{floor}"/>'
    for value in _log_ticks(*frame.y_range) if frame.log else _ticks(*frame.y_range):
        yield _text(LEFT - 5, frame.y(value) + 3.5, f"{value:g}", "end")
        yield f'<path class="grid" d="M{LEFT} {frame.y(value):.1f}H{right}"/>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>'
    yield _text((LEFT + right) / 2, frame.height - 5, names[0], "middle")
    yield _text(LEFT + 4, TOP + 2, names[1], "start")


def _labels(
    marks: Sequence[Mark], placed: Sequence[tuple[float, float]], corners: Sequence[tuple[float, float]], frame: _Frame
) -> Iterator[str]:
    """Names beside their marks where there is room, in the marks' order; the rest are told by tooltip and table.

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
            box, text = found
            taken.append(box)
            yield f'<g class="{mark.colour} name">{text}</g>'


def _free_place(label: str, x: float, y: float, taken: Sequence[Box], frame: _Frame) -> tuple[Box, str] | None:
    """The first place around (x, y) for a label that lies on nothing that is taken, and the label there."""
    wide = LETTER * len(label)
    for dx, dy, anchor in PLACES:
        begin = x + dx - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
        box = (begin, y + dy - 9, begin + wide, y + dy + 2)
        inside = box[0] > LEFT and box[2] < frame.width and box[1] > 0 and box[3] < frame.height - BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return box, _text(x + dx, y + dy, label, anchor)
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _log_padded(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 1.25, max(values) * 1.35


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between the two."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (5, 2.5, 2, 1) if step * factor * 3.5 <= high - low)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in decades for factor in (1, 2, 5)]
    return [float(f"{value:.3g}") for value in found if low <= value <= high]
