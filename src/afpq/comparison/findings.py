# SPDX-License-Identifier: MIT
"""What the results of a comparison show, in sentences, and no more than their standard errors allow.

Two cells are compared window by window: which text is hard is common to both, so their difference is known far better
than either figure. Where it is less than twice its standard error, the words are "no difference beyond the noise".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from afpq.comparison.cells import Cell, Result
from afpq.numerics.formats import INTEGERS
from afpq.numerics.scheme import Scheme

SURE = 2.0  # standard errors
EQUAL_BITS = 0.01  # true bits that count as the same


@dataclass(frozen=True)
class Difference:
    """The mean of first - second over the windows, and its standard error (NaN for a single window)."""

    mean: float
    error: float

    @property
    def sure(self) -> bool:
        return abs(self.mean) > SURE * self.error


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two cells' figures of the same windows; at least one window."""
    deltas = [a - b for a, b in zip(first, second, strict=True)]
    mean = math.fsum(deltas) / len(deltas)
    if len(deltas) < 2:
        return Difference(mean, math.nan)
    variance = math.fsum((delta - mean) ** 2 for delta in deltas) / (len(deltas) - 1)
    return Difference(mean, math.sqrt(variance / len(deltas)))


def kl_difference(first: Result, second: Result) -> Difference:
    """Return KL of the first minus KL of the second, in nats per token."""
    return difference(first.window_divergences, second.window_divergences)


def rise(result: Result, original: Result) -> Difference:
    """Return perplexity minus the float model's; the error is that of the paired losses, to first order."""
    loss = difference(result.window_losses, original.window_losses)
    mean = result.evaluation.perplexity - original.evaluation.perplexity
    return Difference(mean, result.evaluation.perplexity * loss.error)


def pareto_front(results: Iterable[Result], loss: Callable[[Result], float] = lambda r: r.kl) -> list[Result]:
    """Return the results that none beats or equals in true bits and loss, by rising bits; of equal ones the first."""
    front: list[Result] = []
    for result in sorted(results, key=lambda r: (r.bits_per_weight, loss(r))):
        if not front or loss(result) < loss(front[-1]):
            front.append(result)
    return front


@dataclass(frozen=True)
class Pair:
    """Two scales against something else at equal or nearly equal true bits, by the same method.

    `other` is None if that cell was not measured; `wanted` names it.
    """

    kind: str
    two: Result
    other: Result | None
    wanted: Cell


def pairs(results: Sequence[Result]) -> list[Pair]:
    """Find, for every cell with two scales, one scale at half the group, and the zero points nearest in true bits."""
    by_cell = {result.cell: result for result in results}
    found = []
    for result in results:
        scheme = result.cell.ours
        if scheme is None or not scheme.two_scales:
            continue
        if scheme.group_size > 1:
            half = Scheme(scheme.format, scheme.group_size // 2, True, scheme.scale_dtype)
            wanted = Cell(str(half), result.cell.method)
            found.append(Pair("one scale, half the group", result, by_cell.get(wanted), wanted))
        zero_points = [r for r in results if _is_zero_point(r.cell, result.cell.method, scheme)]
        nearest = min(zero_points, key=lambda r: abs(r.bits_per_weight - result.bits_per_weight), default=None)
        integer = replace(scheme, format=INTEGERS[scheme.format.bits])
        named = Cell(str(integer), result.cell.method)
        found.append(Pair("scale and zero point", result, nearest, nearest.cell if nearest else named))
    return found


def _is_zero_point(cell: Cell, method: str, like: Scheme) -> bool:
    scheme = cell.ours if cell.method == method else None
    return scheme is not None and scheme.zero_point and scheme.format.bits == like.format.bits


def verdict(pair: Pair) -> str:
    """State which is better by how much, or that the difference is not significant."""
    if pair.other is None:
        return f"not measured: add {pair.wanted.scheme} to see"
    delta, base = kl_difference(pair.two, pair.other), pair.other.kl
    if math.isnan(delta.error):
        return "one window of text cannot tell"
    if not delta.sure:
        return "no difference beyond the noise"
    side = "two scales are better" if delta.mean < 0 else "two scales are worse"
    return f"{side} by {100 * abs(delta.mean) / base:.0f} % of the KL" if base else side


def bits_text(pair: Pair) -> str:
    """State whether the two have the same size."""
    if pair.other is None:
        return ""
    gap = pair.other.bits_per_weight - pair.two.bits_per_weight
    if abs(gap) <= EQUAL_BITS:
        return "at equal bits"
    return f"which has {abs(gap):.2f} bits {'more' if gap > 0 else 'less'}"


def best_by_width(results: Iterable[Result]) -> dict[int, list[Result]]:
    """Return whole bits -> the cell of lowest KL with so many and a fraction, then all it does not surely beat."""
    widths: dict[int, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.kl):
        widths.setdefault(int(result.bits_per_weight), []).append(result)
    return {
        width: [members[0], *(m for m in members[1:] if not kl_difference(m, members[0]).sure)]
        for width, members in sorted(widths.items())
    }


def sentences(results: Sequence[Result]) -> list[str]:
    """Write the findings, most important first. `results` starts with the float model."""
    quantized = [result for result in results if not result.cell.is_float]
    if not quantized:
        return []
    findings = []
    for width, (best, *equals) in best_by_width(quantized).items():
        text = (
            f"Best with {width} bits and a fraction: {best.cell} ({best.bits_per_weight:.3f} true bits, "
            f"KL x 1000 {1000 * best.kl:.2f})"
        )
        if equals:
            text += f"; within the noise of it: {', '.join(_with_bits(r) for r in equals)}"
        findings.append(f"{text}.")
    front = pareto_front(quantized)
    names = ", ".join(_with_bits(r) for r in front)
    rest = "; every other cell has one beside it with no more bits and no higher KL"
    beaten = rest if len(front) < len(quantized) else ""
    findings.append(f"On the Pareto front of KL against true bits: {names}{beaten}.")
    missing: dict[str, None] = {}
    for pair in pairs(quantized):
        if pair.other is None:
            missing[str(pair.wanted)] = None
        else:
            findings.append(f"{pair.two.cell} against {pair.other.cell}, {bits_text(pair)}: {verdict(pair)}.")
    if missing:
        findings.append(f"Not measured, and needed to judge two scales at equal bits: {', '.join(missing)}.")
    return findings


def _with_bits(result: Result) -> str:
    return f"{result.cell} ({result.bits_per_weight:.3f})"
