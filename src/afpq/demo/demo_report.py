# SPDX-License-Identifier: MIT
"""The demo's results as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afpq.checkpoint.atomic_files import write_json, write_whole
from afpq.errors import AfpqError
from afpq.evaluation.perplexity import Evaluation
from afpq.evaluation.tables import table


@dataclass(frozen=True)
class Row:
    """One quantized model (or the original: scheme "float"), its size and its figures."""

    scheme: str
    bits_per_weight: float
    megabytes: float
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


HEADER = ("scheme", "bits/weight", "size MB", "perplexity", "KL x 1000", "top-1 %")


def cells(row: Row) -> tuple[str, ...]:
    """Format the row, in the order of HEADER."""
    e = row.evaluation
    kl = "" if e.kl_divergence is None else f"{1000 * e.kl_divergence:.1f} ±{1000 * (e.kl_standard_error or 0):.1f}"
    agreement = "" if e.top1_agreement is None else f"{100 * e.top1_agreement:.1f}"
    perplexity = f"{e.perplexity:.2f} ±{e.standard_error:.2f}"
    return row.scheme, f"{row.bits_per_weight:.3f}", f"{row.megabytes:.2f}", perplexity, kl, agreement


def markdown_table(rows: Sequence[Row]) -> str:
    """Write a Markdown table, numbers right-aligned."""
    return table(HEADER, [cells(row) for row in rows], text_columns=1) + "\n"


def write_report(directory: Path, title: str, text: str, rows: Sequence[Row]) -> list[Path]:
    """Write report.md, report.json and, if matplotlib is installed, report.png; return the paths.

    Raises AfpqError if the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = [directory / "report.md", directory / "report.json"]
        picture = plot_symmetric_against_asymmetric(rows, title, directory / "report.png")
        image = f"![{title}]({picture.name})\n\n" if picture else ""
        write_whole(written[0], f"# {title}\n\n{text}\n\n{image}{markdown_table(rows)}".encode())
        write_json(written[1], {"title": title, "rows": [row.to_json() for row in rows]})
    except OSError as error:
        raise AfpqError(f"{directory}: cannot write the report: {error.strerror or error}") from None
    return [*written, *([picture] if picture else [])]


def plot_symmetric_against_asymmetric(rows: Sequence[Row], title: str, path: Path) -> Path | None:
    """Draw bars of KL divergence, symmetric next to asymmetric, a panel for each bit width; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    measured = {row.scheme: row for row in rows if row.evaluation.kl_divergence is not None}
    pattern = re.compile(r"(?P<format>[a-z]+(?P<bits>\d))-(?P<sym>sym|asym)-.*")
    found = [(match, row) for name, row in measured.items() if (match := pattern.fullmatch(name))]
    widths = sorted({match["bits"] for match, _ in found}, reverse=True)
    figure = Figure(figsize=(4.2 * max(1, len(widths)), 3.9), layout="constrained")
    axes = figure.subplots(1, max(1, len(widths)), squeeze=False)[0]
    for axis, bits in zip(axes, widths):
        _panel(axis, bits, [(m["format"], m["sym"], row) for m, row in found if m["bits"] == bits])
    axes[0].set_ylabel("KL x 1000 (lower is better)")
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_whole(path, picture.getvalue())
    return path


def _panel(axis: Any, bits: str, entries: list[tuple[str, str, Row]]) -> None:
    formats = list(dict.fromkeys(format for format, _, _ in entries))
    for side, (sym, colour, label) in enumerate(
        (("sym", "#b8bec7", "one scale"), ("asym", "#2563eb", "two scales\n(int: zero point)"))
    ):
        for format, kind, row in entries:
            if kind != sym:
                continue
            x, kl = formats.index(format) + 0.38 * (side - 0.5), 1000 * (row.evaluation.kl_divergence or 0)
            error = 1000 * (row.evaluation.kl_standard_error or 0)
            axis.bar(x, kl, 0.36, yerr=error, color=colour, ecolor="#444444", label=label)
            axis.annotate(f"{kl:.1f}", (x, kl + error), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(formats)), formats)
    axis.set_title(f"{bits} bits")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=8)
