# SPDX-License-Identifier: MIT
"""`python bench/tradeoff.py` draws docs/tradeoff.png, KL against true bits, from the table of all tools in the log."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
HEADING = "### All tools in one table"
ROW = re.compile(r"\| (?P<bits>\d\.\d+) \| \**(?P<name>[^|*]+?)\** \| (?P<perplexity>[\d.]+) \| (?P<kl>[\d.]+) \|")
# Who made it, by the beginning of the name: (label, colour, marker). The first that fits.
MAKERS = {
    "afpq": ("afpq, GPTQ", "#00796b", "o"),
    "auto-round": ("AutoRound", "#c2410c", "s"),
    "authors gptq": ("the AFPQ authors' GPTQ", "#7c3aed", "^"),
    "llama.cpp": ("llama.cpp", "#2563eb", "D"),
    "llm-compressor": ("other GPTQ (llm-compressor, GPTQModel, AutoGPTQ)", "#a16207", "v"),
    "gptqmodel": ("other GPTQ (llm-compressor, GPTQModel, AutoGPTQ)", "#a16207", "v"),
    "autogptq": ("other GPTQ (llm-compressor, GPTQModel, AutoGPTQ)", "#a16207", "v"),
    "": ("no data (round to nearest, bitsandbytes, HQQ, torchao)", "#8a8a8a", "x"),
}


@dataclass(frozen=True)
class Point:
    """A row of the table: true bits per weight, name, KL x 1000."""

    bits: float
    name: str
    kl: float

    @property
    def maker(self) -> tuple[str, str, str]:
        return next(style for start, style in MAKERS.items() if self.name.startswith(start))


def points_of(log: str) -> list[Point]:
    """The rows of the table under HEADING."""
    section = log.partition(HEADING)[2].partition("\n##")[0]
    return [Point(float(row["bits"]), row["name"], float(row["kl"])) for row in ROW.finditer(section)]


def draw(points: list[Point], path: Path) -> None:
    """A panel for 3 bits and one for 4, KL on one logarithmic axis; two afpq points are named."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, bits in zip(panels, (3, 4)):
        for point in (p for p in points if int(p.bits) == bits):
            label, colour, marker = point.maker
            panel.scatter(point.bits, point.kl, c=colour, marker=marker, s=34, label=label, zorder=3)
            if point.name.endswith("(default)"):
                name = point.name.removeprefix("afpq ").split()[0]
                panel.annotate(name, (point.bits, point.kl), (7, -3), textcoords="offset points", fontsize=8)
        panel.set_yscale("log")
        panel.set_yticks([2, 3, 5, 10, 20, 30, 50], minor=False)
        panel.set_yticks([], minor=True)
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.set_xlabel("true bits per weight, scales included")
        panel.set_title(f"{bits} bits and a fraction", fontsize=10)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL from the float model x 1000")
    legend = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    path = DOCS / "tradeoff.png"
    draw(points_of((DOCS / "LOG.md").read_text("utf-8")), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
