# SPDX-License-Identifier: MIT
"""A comparison as rows of text: what every kind of report shows, rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from afpq.comparison.cells import Result
from afpq.comparison.findings import bits_text, kl_difference, pairs, pareto_front, rise, verdict
from afpq.evaluation.tables import table

HEADER = (
    "scheme", "method", "true bits", "KL x 1000", "perplexity", "rise over float", "top\u20111\u00a0%", "size\u00a0MB",
    "seconds to quantize", "generation, float\u00a0=\u00a01",
)  # fmt: skip
TEXT_COLUMNS = 2  # the first ones; all others are numbers
PAIR_HEADER = ("two scales", "against", "true bits", "KL x 1000, difference", "verdict")


@dataclass(frozen=True)
class About:
    """A description of what was compared, and on what, for the report's readers."""

    model: str
    text: str
    windows: tuple[int, int]  # count, length
    calibration: str | None
    machine: str
    coverage: float
    notes: tuple[str, ...] = ()

    def head(self, original: Result) -> str:
        """Describe the measurement in a line."""
        count, length = self.windows
        perplexity = plus_minus(original.evaluation.perplexity, original.evaluation.standard_error, least=2)
        return f"On {self.text}, {count} windows of {length} tokens; perplexity of the float model: {perplexity}."

    def lines(self) -> list[str]:
        count, length = self.windows
        share = f"{100 * self.coverage:.1f} % of the blocks' weights are quantized"
        return [
            f"Text: {self.text}, {count} windows of {length} tokens that do not overlap, {count * (length - 1):,} "
            "predicted tokens. ± is one standard error over the windows.",
            *([f"Calibration: {self.calibration}."] if self.calibration else []),
            f"True bits count codes, scales and zero points. {share}; embeddings and head stay as they are.",
            "Rise over float and the differences between cells are taken window by window, so that what all cells have "
            'in common cancels. "Beyond the noise" is two standard errors, and holds for this text, model and '
            "calibration; others may decide otherwise.",
            f"Generation is greedy, one token after the other, beside the float model in one run ({self.machine}); "
            "empty for other tools, and for models without the usual cache.",
            "Seconds to quantize are of that machine, as busy as it was; empty where a run was stopped in between.",
            *self.notes,
        ]


def in_order(results: Sequence[Result]) -> list[Result]:
    """Sort: the float model, then by true bits (to three digits) and KL."""
    return sorted(results, key=lambda r: (not r.cell.is_float, round(r.bits_per_weight, 3), r.kl))


def row(result: Result, original: Result) -> tuple[str, ...]:
    """Write a result in the order of HEADER; empty where there is no figure."""
    e = result.evaluation
    same = result.cell.is_float
    seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
    speed = "" if result.speed is None else f"{result.speed:.2f}"
    agreement = "" if e.top1_agreement is None else f"{100 * e.top1_agreement:.1f}"
    delta = rise(result, original)
    return (
        result.cell.scheme, result.cell.method, f"{result.bits_per_weight:.3f}",
        "" if same else plus_minus(1000 * result.kl, 1000 * (e.kl_standard_error or math.nan)),
        plus_minus(e.perplexity, e.standard_error, least=2),
        "" if same else plus_minus(delta.mean, delta.error, sign=True),
        agreement, f"{result.file_bytes / 1e6:.2f}", seconds, speed,
    )  # fmt: skip


def plus_minus(value: float, error: float, sign: bool = False, least: int = 0) -> str:
    """Round to the error's second digit, but at least `least` decimals; two if there is no error."""
    digits = 2 if not math.isfinite(error) or error <= 0 else min(4, max(least, 1 - math.floor(math.log10(error))))
    number = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return number if not math.isfinite(error) else f"{number} ±{error:.{digits}f}"


def pair_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Compare two scales with one and with zero points, in the order of PAIR_HEADER."""
    rows: list[tuple[str, ...]] = []
    for pair in pairs([result for result in results if not result.cell.is_float]):
        if pair.other is None:
            rows.append((str(pair.two.cell), str(pair.wanted), f"{pair.two.bits_per_weight:.3f}", "", verdict(pair)))
            continue
        delta = kl_difference(pair.two, pair.other)
        bits = f"{pair.two.bits_per_weight:.3f} : {pair.other.bits_per_weight:.3f}"
        change = plus_minus(1000 * delta.mean, 1000 * delta.error, sign=True)
        rows.append((str(pair.two.cell), str(pair.other.cell), bits, change, f"{bits_text(pair)}: {verdict(pair)}"))
    return rows


def on_front(results: Sequence[Result]) -> set[str]:
    """Return the names of the cells on the Pareto front."""
    return {str(result.cell) for result in pareto_front(r for r in results if not r.cell.is_float)}


def markdown(title: str, findings: Sequence[str], about: About, results: Sequence[Result]) -> str:
    """Write the whole report, except the charts."""
    original, front = results[0], on_front(results)
    lines = [f"# {title}", "", about.head(original), "", *(f"- {sentence}" for sentence in findings), ""]
    rows = [row(result, original) for result in in_order(results)]
    starred = [(f"**{r[0]}**" if f"{r[0]} {r[1]}" in front else r[0], *r[1:]) for r in rows]
    lines += [table(HEADER, starred, TEXT_COLUMNS), "", "Bold: on the Pareto front of KL against true bits.", ""]
    compared = pair_rows(results)
    if compared:
        lines += ["## Two scales at equal bits", "", table(PAIR_HEADER, compared), ""]
    return "\n".join([*lines, "## How it was measured", "", *(f"- {line}" for line in about.lines())]) + "\n"
