# SPDX-License-Identifier: MIT
"""The comparison as one HTML page that needs nothing but itself: no network, light and dark, wide and narrow.

Layout, CSS and script are in report.html.j2; what it shows is gathered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from afpq.comparison.cells import Result
from afpq.comparison.charts import figures, legend, sample_of
from afpq.comparison.distributions import Asymmetry
from afpq.comparison.rows import HEADER, PAIR_HEADER, About, in_order, on_front, pair_rows, row

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class PageRow:
    """A row of a table: its texts, the mark before the first of them, and whether it is in bold."""

    cells: tuple[str, ...]
    mark: Markup | None = None
    on_front: bool = False


def page(
    title: str, findings: Sequence[str], about: About, results: Sequence[Result], groups: Sequence[Asymmetry]
) -> str:
    """Return the page; `results` starts with the float model."""
    ordered, front = in_order(results), on_front(results)
    drawn = figures(ordered, groups)
    rows = [
        PageRow(row(r, results[0]), None if r.cell.is_float else sample_of(r.cell), str(r.cell) in front)
        for r in ordered
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=title,
        findings=findings,
        about=about,
        original=results[0],
        large=[figure for figure in drawn if not figure.small],
        small=[figure for figure in drawn if figure.small],
        legend=legend(results),
        header=HEADER,
        rows=rows,
        pair_header=PAIR_HEADER,
        pair_rows=[PageRow(cells) for cells in pair_rows(results)],
    )
