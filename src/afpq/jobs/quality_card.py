# SPDX-License-Identifier: MIT
"""The quality card: README.md of a quantized model, in the form of the hub's model cards.

It holds no dates and no timings: the same job writes the same card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.card_header import LOAD, PAPER, front_matter
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import CARD
from afpq.evaluation.tables import size_text, table, with_error
from afpq.jobs.bit_budget import Choice
from afpq.jobs.card_sample import CardFigures
from afpq.jobs.chosen_shares import SHARES, share_cells
from afpq.jobs.error_picture import block_of, error_of, kind_of, plot_errors
from afpq.jobs.sensitivity_file import SENSITIVITIES
from afpq.model.coverage import coverage_warning
from afpq.version import __version__

PICTURE = "card_errors.png"
MAX_NAMES = 12


@dataclass(frozen=True)
class Card:
    """The content of a card. `model` is what was quantized, as the user named it; `notes` are the lines of the log.

    `calibration` is a sentence; `measured` are figures or the reason why there are none; `tested` describes
    the self-test. `choice` is given if the layers' schemes were chosen under a budget of bits.
    """

    model: str
    plan: Plan
    notes: Sequence[dict[str, Any]]
    calibration: str | None
    measured: CardFigures | str
    tested: str
    choice: Choice | None = None


def write_card(directory: Path, card: Card) -> None:
    """Write README.md and, if matplotlib is installed, its picture."""
    picture = plot_errors(card.notes, directory / PICTURE)
    (directory / CARD).write_text(card_text(card, picture), "utf-8")


def card_text(card: Card, picture: bool) -> str:
    """Write the whole card, in Markdown."""
    schemes = card.plan.recipe.scheme if card.choice is None else _mean_bits(card)
    sections = {
        f"{_name(card)}, {schemes} by {card.plan.recipe.method}": f"{_summary(card)}\n\n{_facts(card)}",
        "Quality": f"{_quality(card)}\n\n{_errors(card.notes, picture)}",
        "Load it": LOAD,
        "How it was made": _making(card),
    }
    parts = [f"{'##' if index else '#'} {title}\n\n{text}" for index, (title, text) in enumerate(sections.items())]
    return f"{_front_matter(card)}\n" + "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    scheme = card.plan.recipe.scheme
    tags = ["afpq", "quantized", f"{scheme.format.bits}-bit", scheme.format.name, card.plan.recipe.method]
    return front_matter(None if Path(card.model).exists() else card.model, tags, card.plan.checkpoint.directory)


def _name(card: Card) -> str:
    path = Path(card.model)
    return path.resolve().name if path.exists() else card.model


def _summary(card: Card) -> str:
    name = f"`{_name(card)}`"
    link = name if Path(card.model).exists() else f"[{card.model}](https://huggingface.co/{card.model})"
    bits = f"{card.plan.recipe.scheme.format.bits} bits" if card.choice is None else _mean_bits(card)
    return f"{link} with its weights in {bits}, quantized by afpq ([asymmetric floating point]({PAPER}))."


def _facts(card: Card) -> str:
    plan = card.plan
    scheme = plan.recipe.scheme
    scales = "a scale and a zero point" if scheme.zero_point else "one scale"
    scales = "a scale for each sign" if scheme.two_scales else scales
    group = "row" if scheme.group_size == -1 else f"group of {scheme.group_size} weights"
    warning = coverage_warning(plan.coverage, plan.left, plan.reasons)
    which = "scheme" if card.choice is None else "scheme of most weights"
    others = sorted({str(t.scheme) for t in plan.block_targets} - {str(scheme)})
    published = plan.checkpoint.published
    rows = [
        (which, f"{scheme}: {scheme.format.bits}-bit {scheme.format.name}, {scales} of each {group}"),
        *([("some layers", ", ".join(others))] if others and card.choice is None else []),
        ("method", f"{plan.recipe.method}, scales by {plan.recipe.search}"),
        ("true bits per weight", f"{plan.bits_per_weight:.3f} for a quantized weight, with scales and zero points"),
        ("coverage", f"{100 * plan.coverage:.1f} % of the blocks' weights, {len(plan.block_targets)} linear layers"),
        *([("not quantized", warning)] if warning is not None else []),
        *(
            ("outside the blocks", f"{plan.end_words(t)} as {t.scheme}, {t.size.bits:.3f} true bits per weight")
            for t in plan.end_targets
        ),
        ("bits per weight of all", f"{plan.file_bits_per_weight:.3f}, with what is left as it was"),
        ("size", f"{size_text(plan.output_bytes)} (the original: {size_text(plan.input_bytes)})"),
        *([("the original's form", f"{published.form}; read as floats")] if published is not None else []),
        ("left as it was", _left(plan)),
    ]  # fmt: skip
    facts = table(("", ""), rows)
    return facts if card.choice is None else f"{facts}\n\n{_choice(card.choice, plan)}"


def _mean_bits(card: Card) -> str:
    return f"{card.plan.bits_per_weight:.2f} bits per weight"


def _choice(choice: Choice, plan: Plan) -> str:
    """Show which layers have which scheme, and why."""
    return (
        f"Each layer has the scheme that keeps the predicted KL divergence least at {choice.budget.bits_per_weight:g} "
        f"true bits per weight ({choice.kl:.4f} nats a token, roughly); what was measured for it is in "
        f"`{SENSITIVITIES}`:\n\n{table(SHARES, share_cells(choice, plan))}"
    )


def _left(plan: Plan) -> str:
    """List the linears left by name, and the tensors outside of the blocks."""
    outside = [name for unit in plan.units if not unit.in_blocks for name in unit.tensors if name not in unit.replaced]
    linears = [f"`{name}`" for name in plan.kept]
    others = [f"`{n.removesuffix('.weight')}`" for n in outside if n.removesuffix(".weight") not in plan.kept]
    return _some([*linears, *others]) + "; norms and biases"


def _quality(card: Card) -> str:
    found = card.measured
    if isinstance(found, str):
        return f"Perplexity and KL divergence were not measured: {found}."
    result, (count, length) = found.result, found.sample.windows.shape
    rows = [
        ("perplexity", f"{found.original:.2f}", with_error(result.perplexity, result.standard_error, 2)),
        (
            "KL divergence from the original, nats a token",
            "0",
            with_error(result.kl_divergence, result.kl_standard_error, 4),
        ),
        ("same most likely token", "100 %", f"{100 * (result.top1_agreement or 0):.1f} %"),
    ]
    return (
        f"{table(('', 'original', 'this model'), rows)}\n\n"
        f"Measured on {found.sample.origin}: {count} windows of {length} tokens, a sample. Perplexity depends "
        "on the text and on the windows' length: compare it only with the original's beside it. KL sees every change."
    )


def _errors(notes: Sequence[dict[str, Any]], picture: bool) -> str:
    """Show the errors of the layers: a picture, and a line for each kind of layer, the ends last."""
    notes = sorted(notes, key=lambda note: block_of(note["module"]) is None)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for note in notes:
        kinds.setdefault(kind_of(note["module"]), []).append(note)
    rows = []
    for kind, members in kinds.items():
        worst = max(members, key=error_of)
        mean = sum(map(error_of, members)) / len(members)
        rows.append((f"`{kind}`", str(len(members)), f"{mean:.1e}", f"{error_of(worst):.1e}", f"`{worst['module']}`"))
    by_kind = table(("layers", "number", "mean error", "worst", "where"), rows)
    image = f"![Error of each layer]({PICTURE})\n\n" if picture else ""
    meaning = _MEANING[any("output_error" in note for note in notes)] if notes else ""
    guided = next((note["method"] for note in notes if METHODS[note["method"]].guided), None)
    if guided is not None:
        meaning += f" By {guided}, outputs weigh as the gradients of the predictions say."
    return f"{image}{by_kind}\n\n{meaning}"


_MEANING = {
    True: "Error: squared error of a layer's outputs on the calibration text, relative to the outputs' squares; of an "
    "embedding, of its rows.",
    False: "Error: squared error of a layer's weights, relative to the weights' squares.",
}


def _making(card: Card) -> str:
    recipe = card.plan.recipe
    odd = [note for note in card.notes if note.get("note")]
    lines = [
        card.calibration or f"Calibration: none, {recipe.method} needs no data.",
        *(f"Not by {recipe.method}: `{note['module']}` ({note['note']})." for note in odd[:MAX_NAMES]),
        *([f"{len(odd) - MAX_NAMES} more such layers are in `afpq_log.jsonl`."] if len(odd) > MAX_NAMES else []),
        f"Self-test: every tensor was read back and is as it was computed. {card.tested}",
        "All settings are in `config.json` under `quantization_config`, figures for each layer in `afpq_log.jsonl`.",
        f"Made by afpq {__version__}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
