# SPDX-License-Identifier: MIT
"""KL against true bits: rows of bench/accuracy.py, bench/autoround.py and bench/llama_cpp.py -> docs/tradeoff.png.

    python bench/picture.py                        # of bench/ours.jsonl and bench/peers.jsonl, which are kept
    python bench/picture.py accuracy.jsonl ...     # with rows just measured, which replace kept ones of the same name

Prints all rows as a Markdown table. The picture shows of each tool what none of its own other rows betters: fewer bits
or less KL.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parent
KEPT = (BENCH / "ours.jsonl", BENCH / "peers.jsonl")
BITS, KLS = (1.97, 4.62), (1.1, 170)


@dataclass(frozen=True)
class Row:
    """`kl` and its standard error are in nats a token x 1000, `top1` in percent; None where not known."""

    tool: str
    scheme: str
    method: str
    bits: float
    perplexity: float
    kl: float
    error: float | None
    top1: float | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.tool, self.scheme, self.method

    @property
    def series(self) -> str:
        """The series it belongs to: our methods are told apart, tools are not."""
        return f"{self.tool} {self.method.split('+end')[0].split()[0]}" if self.tool == "afpq" else self.tool


@dataclass(frozen=True)
class Style:
    """How a series is drawn; its label stands at `at` (bits, KL) and points to its point nearest to that.

    `size` of a marker in square points; `width` of the line through them in points, 0 for none.
    """

    label: str
    colour: str
    marker: str
    at: tuple[float, float]
    size: float = 40.0
    width: float = 0.0


STYLES = {
    "afpq tune": Style("afpq, tuned", "#00695c", "o", (2.5, 4.4), 56, 2.6),
    "afpq gptq": Style("afpq,\nGPTQ", "#26a69a", "o", (4.33, 1.7), 48, 2.0),
    "AutoRound": Style("AutoRound", "#c2410c", "s", (2.56, 21), 46),
    "llama.cpp": Style("llama.cpp", "#2563eb", "D", (2.75, 75), 36, 1.0),
    "llm-compressor": Style("llm-compressor", "#a16207", "v", (3.15, 47)),
    "GPTQModel": Style("GPTQModel", "#be185d", "<", (3.42, 19)),
    "AutoGPTQ": Style("AutoGPTQ", "#4d7c0f", ">", (3.62, 5.4)),
    "AFPQ authors": Style("AFPQ\nauthors", "#7c3aed", "^", (4.33, 2.7)),
    "HQQ": Style("HQQ", "#57534e", "P", (3.82, 32)),
    "bitsandbytes": Style("bitsandbytes", "#111827", "X", (3.98, 16)),
    "torchao": Style("torchao", "#0e7490", "*", (3.72, 11.5), 90),
}


def row_of(values: dict[str, Any]) -> Row:
    def thousand(key: str) -> float | None:
        return 1000 * values[key] if values.get(key) is not None else None

    top1, kl = thousand("top1_agreement"), thousand("kl_divergence")
    assert kl is not None, f"no KL in {values}"
    names = (values.get("tool", "afpq"), values["scheme"], values["method"])
    figures = (values["bits"], values["perplexity"], kl, thousand("kl_standard_error"))
    return Row(*names, *figures, None if top1 is None else top1 / 10)


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows; of two with the same name, the later."""
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    return list({row.key: row for row in map(row_of, map(json.loads, lines))}.values())


def frontier(rows: Iterable[Row]) -> list[Row]:
    """By bits, those of less KL than any of at most as many bits."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (round(row.bits, 3), row.kl)):
        if not best or row.kl < best[-1].kl:
            best.append(row)
    return best


def table(rows: Iterable[Row]) -> str:
    """Markdown, by bits and KL; ours in bold."""
    lines = ["| true bits | tool | scheme | method | perplexity | KL x1e3 | ± | top-1 % |"]
    lines.append("|---:|---|---|---|---:|---:|---:|---:|")
    for row in sorted(rows, key=lambda row: (round(row.bits, 3), row.kl)):
        tool = f"**{row.tool}**" if row.tool == "afpq" else row.tool
        error = "" if row.error is None else f"{row.error:.2f}"
        top1 = "" if row.top1 is None else f"{row.top1:.1f}"
        names = f"{row.bits:.3f} | {tool} | {row.scheme} | {row.method}"
        lines.append(f"| {names} | {row.perplexity:.2f} | {row.kl:.2f} | {error} | {top1} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """A line for each series, its label beside it; letters large enough for a picture 390 points wide."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    figure = Figure(figsize=(5.2, 5.9), dpi=160, layout="constrained")
    axes = figure.add_subplot(xlim=BITS, ylim=KLS, yscale="log")
    for series, style in STYLES.items():
        if points := frontier(row for row in rows if row.series == series):
            bits, kls, over = [p.bits for p in points], [p.kl for p in points], 2 * series.startswith("afpq ")
            axes.plot(bits, kls, color=style.colour, linewidth=style.width, alpha=1 if over else 0.5, zorder=2 + over)
            axes.scatter(
                bits,
                kls,
                style.size,
                style.colour,
                marker=style.marker,
                edgecolors="white",
                linewidths=0.6,
                zorder=3 + over,
            )
            label(axes, style, points)
    axes.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([2, 2.5, 3, 3.5, 4, 4.5])
    axes.tick_params(labelsize=11)
    axes.set_xlabel("true bits per weight, scales included", fontsize=11)
    axes.set_title("KL from the float model x 1000 (less is better)", fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def label(axes: Any, style: Style, points: list[Row]) -> None:
    """The label, and a thin line to the nearest of the points."""

    def distance(point: Row) -> float:
        place = axes.transData.transform((point.bits, point.kl)) - axes.transData.transform(style.at)
        return float((place**2).sum())

    near = min(points, key=distance)
    axes.annotate(
        style.label,
        (near.bits, near.kl),
        style.at,
        fontsize=11,
        color=style.colour,
        fontweight="bold" if style.label.startswith("afpq") else "normal",
        va="center",
        arrowprops={"arrowstyle": "-", "color": style.colour, "linewidth": 0.8, "shrinkB": 4},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="*", help="JSON lines beside those kept")
    parser.add_argument("--out", type=Path, default=BENCH.parent / "docs" / "tradeoff.png")
    arguments = parser.parse_args()
    rows = read([*KEPT, *arguments.rows])
    draw(rows, arguments.out)
    print(table(rows))


if __name__ == "__main__":
    main()
