# SPDX-License-Identifier: MIT
"""The charts of a comparison, each with its caption."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean

from markupsafe import Markup

from afpq.algorithms.methods import METHODS
from afpq.comparison.cells import Cell, LayerError, Result
from afpq.comparison.distributions import BINS, EDGE, LOPSIDED, SAMPLED_LAYERS, SAMPLED_ROWS, Asymmetry, entropy
from afpq.comparison.findings import pareto_front, rise
from afpq.comparison.svg import STRONGEST, Mark, bars, heat, scatter, shape_sample

MAX_SMALL_CHARTS = 12  # cells that get a small chart of their own
METHOD_COLOURS = ("c0", "c1", "c2", "c3", "c5")  # classes of the page, for methods in the order of METHODS
TOOL_COLOUR = "c4"
SAMPLE_NOTE = f"Counted on {SAMPLED_LAYERS} layers and {SAMPLED_ROWS} rows of each, evenly spread, if there are more."
SHAPE_MEANINGS = {"dot": "two scales", "ring": "one scale", "square": "scale and zero point"}


@dataclass(frozen=True)
class Panel:
    """A chart as SVG under its heading, which may be empty, and a few words in smaller letters."""

    svg: Markup
    heading: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart, or several small ones, with the words around them."""

    title: str
    panels: tuple[Panel, ...]
    caption: str
    small: bool = False


def shape_of(cell: Cell) -> str:
    scheme = cell.ours
    if scheme is None:
        return "triangle"
    return "square" if scheme.zero_point else "ring" if scheme.sym else "dot"


def colour_of(cell: Cell) -> str:
    return colours().get(cell.method, TOOL_COLOUR)


def colours() -> dict[str, str]:
    """Return the class of each method; the first again after the last."""
    return dict(zip(METHODS, cycle(METHOD_COLOURS)))


def sample_of(cell: Cell) -> Markup:
    """Draw the mark that stands for a cell in the charts."""
    return shape_sample(shape_of(cell), colour_of(cell))


def figures(results: Sequence[Result], groups: Sequence[Asymmetry]) -> list[Figure]:
    """Return all figures that the results (the float model's first) have data for."""
    original, quantized = results[0], list(results[1:])
    found = []
    if quantized:
        front = pareto_front(quantized)
        ordered = [*front, *(r for r in quantized if r not in front)]  # the front is labelled first
        found += [_kl(ordered, front), _perplexity(ordered, original)]
    return found + [f for f in (_layers(quantized), _asymmetry(groups), _codes(quantized)) if f.panels]


def legend(results: Sequence[Result]) -> list[tuple[Markup, str]]:
    """Return the colours and shapes in use, and their meanings."""
    cells = [result.cell for result in results if not result.cell.is_float]
    methods, shapes = {cell.method for cell in cells}, {shape_of(cell) for cell in cells}
    entries = [(shape_sample("swatch", colour), m) for m, colour in colours().items() if m in methods]
    if methods - colours().keys():
        entries.append((shape_sample("triangle", TOOL_COLOUR), "another tool"))
    return entries + [(shape_sample(shape, ""), text) for shape, text in SHAPE_MEANINGS.items() if shape in shapes]


def _tip(result: Result) -> str:
    e = result.evaluation
    return (
        f"{result.cell}: {result.bits_per_weight:.3f} bits, KL x 1000 {1000 * result.kl:.2f} "
        f"± {1000 * (e.kl_standard_error or 0):.2f}, perplexity {e.perplexity:.2f}"
    )


def _mark(result: Result, y: float, error: float) -> Mark:
    cell = result.cell
    label = f"{cell.scheme} {cell.method}" if cell.ours is None else cell.scheme
    error = error if error == error else 0.0  # NaN for a single window
    return Mark(result.bits_per_weight, y, error, label, _tip(result), colour_of(cell), shape_of(cell))


def _kl(ordered: Sequence[Result], front: Sequence[Result]) -> Figure:
    least = 1e-6  # a logarithm needs something; no bfloat16 model is nearer than this to itself
    marks = [_mark(r, max(1000 * r.kl, least), 1000 * (r.evaluation.kl_standard_error or 0)) for r in ordered]
    corners = [(r.bits_per_weight, max(1000 * r.kl, least)) for r in front]
    chart = scatter(marks, "KL divergence against true bits", ("true bits per weight", "KL x 1000"), corners, log=True)
    return Figure(
        "KL divergence against true bits", (Panel(chart),),
        "How far each cell's predictions are from the float model's; lower is better. The line is the Pareto front, "
        "the bars are one standard error.",
    )  # fmt: skip


def _perplexity(ordered: Sequence[Result], original: Result) -> Figure:
    marks = [_mark(r, r.evaluation.perplexity, rise(r, original).error) for r in ordered]
    corners = [
        (r.bits_per_weight, r.evaluation.perplexity) for r in pareto_front(ordered, lambda r: r.evaluation.perplexity)
    ]
    level = (original.evaluation.perplexity, "float")
    chart = scatter(marks, "Perplexity against true bits", ("true bits per weight", "perplexity"), corners, level)
    return Figure(
        "Perplexity against true bits", (Panel(chart),),
        "The line is the Pareto front. The bars are one standard error of the difference from the float model, window "
        "by window; the perplexity itself is less certain (see the table), but that is common to all cells.",
    )  # fmt: skip


def _layers(results: Sequence[Result]) -> Figure:
    drawn = [r for r in results if r.layers][:MAX_SMALL_CHARTS]
    caption = (
        "Relative squared error of each layer: of its outputs where the method learned from text, else of its weights. "
        f"Stronger squares are above the mean of their chart, the strongest {STRONGEST:g} times and more."
        + _left_out(results, len(drawn))
    )
    return Figure("Error of each layer", tuple(map(_layer_panel, drawn)), caption, True)


def _error(layer: LayerError) -> float:
    return layer.weight if layer.output is None else layer.output


def _layer_panel(result: Result) -> Panel:
    of = "outputs" if any(layer.output is not None for layer in result.layers) else "weights"
    note = f"{of}, mean error {1000 * fmean(map(_error, result.layers)):.2f}e-3"
    return Panel(_layer_chart(result), str(result.cell), note)


def _layer_chart(result: Result) -> Markup:
    """Draw blocks from left to right, kinds of layers from top to bottom; the mean of several of a kind (experts)."""
    squares: dict[str, dict[int, list[float]]] = {}
    for layer in result.layers:
        match = re.fullmatch(r"\D*?\.?(\d+)\.(.+)", layer.module)
        block, kind = (int(match[1]), re.sub(r"\d+", "*", match[2])) if match else (0, layer.module)
        squares.setdefault(kind, {}).setdefault(block, []).append(_error(layer))
    columns = 1 + max(block for blocks in squares.values() for block in blocks)
    rows = [
        (kind.rpartition(".")[2], [fmean(blocks[b]) if b in blocks else None for b in range(columns)])
        for kind, blocks in sorted(squares.items())
    ]
    return heat(rows, f"error of each layer, {result.cell}", lambda kind, b, v: f"block {b} {kind}: {v:.2e}")


def _asymmetry(groups: Sequence[Asymmetry]) -> Figure:
    step = 2 * EDGE / BINS
    panels = []
    for group in groups:
        total = sum(group.counts) or 1
        name = "a whole row" if group.group_size == -1 else f"{group.group_size} weights"
        tips = [
            f"log2 ratio {-EDGE + i * step:.1f} to {-EDGE + (i + 1) * step:.1f}: {100 * count / total:.1f} % of groups"
            for i, count in enumerate(group.counts)
        ]
        ticks = [(BINS * (i + 2) / 4, text) for i, text in ((-2, "-2"), (-1, "-1"), (0, "0"), (1, "1"), (2, "2"))]
        chart = bars(group.counts, f"log2 of max against |min|, groups of {name}", ticks, tips)
        panels.append(Panel(chart, f"groups of {name}", f"{100 * group.lopsided:.0f} % lopsided"))
    caption = (
        "log2 of the largest weight against the most negative one, in each group of the float model: at 0 both sides "
        f"reach equally far, at 1 the positive side twice as far. Lopsided: one side at least {LOPSIDED:g} times the "
        f"other. One scale wastes codes on the shorter side; two scales do not. {SAMPLE_NOTE}"
    )
    return Figure("How lopsided the groups are", tuple(panels), caption, True)


def _codes(results: Sequence[Result]) -> Figure:
    drawn = [r for r in results if r.codes][:MAX_SMALL_CHARTS]
    caption = (
        "Share of the weights that got each code, lowest value first. The bits a code carries (its entropy) fall short "
        f"of the bits it takes where codes are used unevenly. {SAMPLE_NOTE}" + _left_out(results, len(drawn))
    )
    return Figure("Which codes are used", tuple(map(_code_panel, drawn)), caption, True)


def _code_panel(result: Result) -> Panel:
    scheme = result.cell.ours
    assert scheme is not None  # only our own cells count codes
    values, total = scheme.format.values, sum(result.codes) or 1
    names = [f"code {i}" if scheme.format.learned else f"code {i}, value {v:.3g}" for i, v in enumerate(values)]
    tips = [f"{name}: {100 * n / total:.1f} %" for name, n in zip(names, result.codes)]
    zero = next((i for i, v in enumerate(values) if v == 0 and not scheme.format.learned), None)
    ticks = [(0.5, f"{values[0]:.3g}"), (len(values) - 0.5, f"{values[-1]:.3g}")]
    if zero is not None and not scheme.zero_point:
        ticks.append((zero + 0.5, "0"))
    note = f"{entropy(result.codes):.2f} of {scheme.format.bits} bits"
    return Panel(bars(result.codes, f"use of codes, {result.cell}", ticks, tips), str(result.cell), note)


def _left_out(results: Sequence[Result], drawn: int) -> str:
    more = sum(1 for r in results if r.layers) - drawn
    return f" Shown are {drawn} cells; the others are in report.json." if drawn == MAX_SMALL_CHARTS and more > 0 else ""
