# SPDX-License-Identifier: MIT
"""The comparison as one HTML page that needs nothing but itself: no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from afpq.comparison.cells import Result
from afpq.comparison.charts import Figure, colour_of, figures, legend, shape_of
from afpq.comparison.distributions import Asymmetry
from afpq.comparison.rows import HEADER, PAIR_HEADER, TEXT_COLUMNS, About, in_order, on_front, pair_rows, row
from afpq.comparison.svg import shape_sample

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d5dae1; --paper: #ffffff; --box: #f5f7fa;
  --c0: #2563eb; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #6b7280;
  --c5: #be185d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba; --line: #39414d; --paper: #14181d;
  --box: #1d232b; --c0: #7aa7ff; --c1: #ff9a62; --c2: #5fd38d; --c3: #cf9bff; --c4: #a3adba;
  --c5: #ff7eb6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 0.85rem; margin: 0; overflow-wrap: anywhere; }
small, figcaption, .how { color: var(--soft); font-size: 0.85rem; }
h3 small { display: block; font-weight: normal; }
ul { padding-left: 1.2rem; margin: 0.5rem 0; } li { margin: 0.2rem 0; overflow-wrap: anywhere; }
.box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.box:focus-visible, button:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; background: var(--box); vertical-align: bottom; white-space: normal; min-width: 4.5rem; }
.t { text-align: left; } tr.front th { font-weight: 700; } tbody th { font-weight: 400; }
tbody th { position: sticky; left: 0; background: var(--paper); }
thead th:first-child { position: sticky; left: 0; }
td.v { white-space: normal; min-width: 14rem; }
button { all: unset; cursor: pointer; } th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.85rem; } .legend span { white-space: nowrap; }
.sample { vertical-align: -2px; margin-right: 0.35rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.charts.large { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; } figcaption { max-width: 60rem; margin: 0.3rem 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); } .sample { display: inline; width: 14px; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); }
.name text { fill: currentColor; stroke: var(--paper); stroke-width: 3; paint-order: stroke; }
.mark { fill: currentColor; } .ring { fill: var(--paper); stroke: currentColor; stroke-width: 2; }
.bar { fill: var(--c0); } .axis, .grid, .error, .front, .level { fill: none; stroke: var(--line); }
.axis { stroke: var(--soft); } .error { stroke: currentColor; stroke-width: 1.2; }
.front { stroke: var(--soft); stroke-width: 1.2; stroke-linejoin: round; }
.level { stroke: var(--soft); stroke-dasharray: 4 4; }
.narrow { display: none; } @media (max-width: 60rem) { .narrow { display: inline; } }
@media print { .box { overflow: visible; } }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending", column = head.cellIndex;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = line => line.cells[column].dataset.v ?? line.cells[column].textContent;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)], numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
    if ((x === "") !== (y === "")) return x === "" ? 1 : -1;  // nothing to tell goes last, whichever way
    return (up ? 1 : -1) * (numbers ? x - y : x.localeCompare(y));
  };
  body.append(...[...body.rows].sort(order));
};
"""


def page(title: str, said: Sequence[str], about: About, results: Sequence[Result], groups: Sequence[Asymmetry]) -> str:
    """`results` starts with the float model; `said` are the findings in words."""
    drawn = figures(in_order(results), groups)
    large = [_figure(figure, results) for figure in drawn if not figure.small]
    compared = pair_rows(results)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=how>{escape(about.head(results[0]))}</p>",
        _list(said),
        f'<div class="charts large">{"".join(large)}</div>' if large else "",
        "<h2>All cells</h2>",
        "<p class=how>In bold: on the Pareto front of KL against true bits. A click on a heading sorts."
        " <span class=narrow>The table scrolls sideways.</span></p>",
        _results_table(results),
        f"<h2>Two scales at equal bits</h2>{_pairs_table(compared)}" if compared else "",
        *(_figure(figure, results) for figure in drawn if figure.small),
        "<h2>How it was measured</h2>",
        f'<div class="how">{_list(about.lines())}</div>',
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{chr(10).join(part for part in parts if part)}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _figure(figure: Figure, results: Sequence[Result]) -> str:
    charts = [f"<div>{f'<h3>{heading}</h3>' if heading else ''}{svg}</div>" for heading, svg in figure.charts]
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
    if figure.small:
        return f'<h2>{figure.title}</h2><figure>{caption}<div class="charts small">{"".join(charts)}</div></figure>'
    key = f'<div class="legend">{legend(results)}</div>'
    return f"<figure><h2>{figure.title}</h2>{key}{''.join(charts)}{caption}</figure>"


def _results_table(results: Sequence[Result]) -> str:
    head = "".join(
        f'<th scope="col"{" class=t" if i < TEXT_COLUMNS else ""}><button>{name}</button></th>'
        for i, name in enumerate(HEADER)
    )
    original, front = results[0], on_front(results)
    lines = []
    for result in in_order(results):
        scheme, method, *numbers = row(result, original)
        sample = "" if result.cell.is_float else shape_sample(shape_of(result.cell), colour_of(result.cell))
        cells = f'<th scope="row" class="t">{sample}{escape(scheme)}</th><td class="t">{escape(method)}</td>'
        cells += "".join(f'<td data-v="{text.split(" ")[0]}">{text}</td>' for text in numbers)
        lines.append(f"<tr{' class=front' if str(result.cell) in front else ''}>{cells}</tr>")
    return _table(head, lines, "All cells")


def _pairs_table(rows: Sequence[Sequence[str]]) -> str:
    numbers = {2, 3}
    head = "".join(
        f'<th scope="col"{"" if i in numbers else " class=t"}>{name}</th>' for i, name in enumerate(PAIR_HEADER)
    )
    lines = []
    for two, *rest in rows:
        other, bits, change, verdict = map(escape, rest)
        lines.append(
            f'<tr><th scope="row" class="t">{escape(two)}</th><td class="t">{other}</td><td>{bits}</td>'
            f'<td>{change}</td><td class="t v">{verdict}</td></tr>'
        )
    return _table(head, lines, "Two scales at equal bits")


def _table(head: str, lines: Sequence[str], name: str) -> str:
    """Scrolls inside its own box where the window is narrow; the box can be reached by keyboard for that."""
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
