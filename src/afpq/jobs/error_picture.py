# SPDX-License-Identifier: MIT
"""The picture of a quality card: the error of each layer along the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_errors(notes: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw a line for each kind of layer along the blocks; rounding to nearest in grey.

    Returns whether there is a picture: not without matplotlib, nor without layers.
    """
    if not notes:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    notes = [note for note in notes if block_of(note["module"]) is not None] or notes
    kinds = list(dict.fromkeys(kind_of(note["module"]) for note in notes))
    for kind in kinds:
        members = [note for note in notes if kind_of(note["module"]) == kind]
        blocks = [block_of(note["module"]) or 0 for note in members]
        axis.plot(blocks, [error_of(note) for note in members], marker="o", markersize=3, linewidth=1.2, label=kind)
    before = [(block_of(n["module"]) or 0, n["output_error_before"]) for n in notes if "output_error_before" in n]
    if before:
        axis.scatter(
            [x for x, _ in before], [y for _, y in before], s=10, color="#b8bec7", zorder=1, label="rounded to nearest"
        )
    _finish(axis, "output" if before else "weight", sorted(map(error_of, notes)))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def _finish(axis: Any, what: str, errors: Sequence[float]) -> None:
    """Set scales and labels; a logarithmic scale would blow up the differences of errors that are nearly equal."""
    if 0 < 10 * errors[0] < errors[-1]:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("block")
    axis.set_ylabel(f"relative squared {what} error")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", which="both", color="#eeeeee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))


def kind_of(module: str) -> str:
    """Return the last part of a name: up_proj of `model.layers.3.mlp.up_proj`."""
    return module.rpartition(".")[2]


def error_of(note: dict[str, Any]) -> float:
    """Return the error of the layer's outputs if it is known, else of its weights."""
    return float(note.get("output_error", note["weight_error"]))


def block_of(module: str) -> int | None:
    """Return the first part of a module's name that is a number; None outside of the blocks."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
