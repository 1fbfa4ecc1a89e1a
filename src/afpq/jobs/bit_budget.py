# SPDX-License-Identifier: MIT
"""A budget of bits: each group of layers gets the scheme that makes the predicted KL of the whole least.

The schemes to choose from are data (CANDIDATES, or the user's). What each costs in each group is measured
(`sensitivity.py`) and kept in a file, so that another budget, or a run that was stopped, need not measure again. The
choice becomes overrides of the recipe, and so all else knows it as if the user had named every layer.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from afpq.calibration.sensitivity import GroupLosses, SensitivitySettings, kind_of_layer, measure_losses
from afpq.checkpoint.atomic_files import digest_value, write_json
from afpq.checkpoint.plan import Plan, Target
from afpq.checkpoint.reader import read_json
from afpq.checkpoint.verify import checkpoint_digest
from afpq.errors import AfpqError
from afpq.jobs.knapsack import choose_options
from afpq.model.blocks import find_blocks
from afpq.numerics.scheme import Scheme, parse_scheme
from afpq.progress import Progress
from afpq.recipe import Recipe
from afpq.version import __version__

SENSITIVITIES = "afpq_sensitivities.json"  # in a result whose schemes were chosen: what was measured, what was chosen

# From 2.25 to 4.5 true bits in small steps. Not 8 bits: no kernel is fast there.
CANDIDATES = (
    "nf2-asym-g64-log8", "nf2-asym-g32-log8",
    "nf3-sym-g128-log8", "nf3-sym-g64-log8", "nf3-asym-g64-log8", "nf3-asym-g32-log8",
    "nf4-sym-g128-log8", "nf4-sym-g64-log8", "nf4-asym-g64-log8", "nf4-asym-g32-log8",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """True bits, scales included, of a quantized weight of the blocks on average, at most; and what to choose from."""

    bits_per_weight: float
    candidates: tuple[Scheme, ...] = tuple(map(parse_scheme, CANDIDATES))

    def __post_init__(self) -> None:
        if not 0 < self.bits_per_weight < 64:
            raise AfpqError(f"bits per weight {self.bits_per_weight}: use a number such as 3.5")
        if not self.candidates:
            raise AfpqError("no candidates to choose from; give schemes such as nf3-asym-g64-log8,nf4-asym-g64-log8")
        twice = next((scheme for scheme, count in Counter(self.candidates).items() if count > 1), None)
        if twice is not None:
            raise AfpqError(f"candidate {twice} is named twice")


def make_budget(bits_per_weight: float | None, candidates: Sequence[str | Scheme] | None) -> Budget | None:
    """From what a user gave; None for nothing. Raises AfpqError for candidates without a budget, or bad ones."""
    if bits_per_weight is None:
        if candidates is not None:
            raise AfpqError("candidates (--candidates) are for a budget of bits: give --bits-per-weight too")
        return None
    if candidates is None:
        return Budget(bits_per_weight)
    return Budget(bits_per_weight, tuple(parse_scheme(c) if isinstance(c, str) else c for c in candidates))


@dataclass(frozen=True)
class Choice:
    """A scheme for each group. `kl`: predicted divergence from the float model, nats a token; a rough figure.

    `key` tells what the losses were measured on; the groups' losses are in the order of the budget's candidates.
    """

    budget: Budget
    groups: tuple[GroupLosses, ...]
    schemes: tuple[Scheme, ...]
    kl: float
    key: dict[str, str]

    def layers(self) -> dict[str, Scheme]:
        return {layer: scheme for group, scheme in zip(self.groups, self.schemes) for layer in group.layers}

    def to_json(self) -> dict[str, Any]:
        """What is kept beside a result; `read_losses` reads it."""
        return {
            **_losses_json(self.budget.candidates, self.groups, self.key),
            "bits_per_weight": self.budget.bits_per_weight,
            "predicted_kl": self.kl,
            "chosen": list(map(str, self.schemes)),
        }


def free_targets(plan: Plan) -> list[Target]:
    """The linears of the blocks that no override of the user settles."""
    patterns = [pattern for pattern, _ in plan.recipe.overrides]
    return [t for t in plan.block_targets if not any(re.search(pattern, t.module) for pattern in patterns)]


def check_budget(plan: Plan, budget: Budget) -> None:
    """Raises AfpqError, before anything is measured, where no choice of schemes can have so many bits."""
    free = free_targets(plan)
    if not free:
        raise AfpqError("nothing is left to choose: an override or a skip settles every layer")
    fixed = sum(t.bytes for t in plan.block_targets) - sum(t.bytes for t in free)
    elements = sum(t.elements for t in plan.block_targets)
    sizes = [[_bytes(target, scheme) for scheme in budget.candidates] for target in free]
    low, high = (8 * (fixed + sum(map(end, sizes))) / elements for end in (min, max))
    if not low <= budget.bits_per_weight <= high:
        raise AfpqError(
            f"bits per weight {budget.bits_per_weight:g}: the candidates can have {low:.4f} to {high:.4f} "
            "on average; choose a number between, or other candidates"
        )


def choose_schemes(plan: Plan, budget: Budget, groups: Sequence[GroupLosses], key: dict[str, str]) -> Choice:
    """The schemes of least predicted KL. What text does not reach gets the most bits that are within the budget's."""
    targets = {target.module: target for target in plan.block_targets}
    costs = [[sum(_bytes(targets[name], s) for name in group.layers) for s in budget.candidates] for group in groups]
    total = sum(target.elements for target in targets.values())
    settled = {layer for group in groups for layer in group.layers}
    left = int(budget.bits_per_weight * total / 8) - sum(t.bytes for t in targets.values() if t.module not in settled)
    spare = left - sum(map(min, costs))
    chosen: dict[int, int] = {}
    for index, group in enumerate(groups):
        if group.losses is None:
            most = int(budget.bits_per_weight * sum(targets[name].elements for name in group.layers) / 8)
            least = min(costs[index])
            cost = max(cost for cost in costs[index] if cost <= max(least, min(most, least + spare)))
            chosen[index] = costs[index].index(cost)
            left, spare = left - cost, spare - (cost - least)
    measured = [(index, group.losses) for index, group in enumerate(groups) if group.losses is not None]
    options = choose_options([costs[index] for index, _ in measured], [losses for _, losses in measured], left)
    chosen |= {index: option for (index, _), option in zip(measured, options)}
    kl = sum(losses[option] for (_, losses), option in zip(measured, options))
    schemes = tuple(budget.candidates[chosen[index]] for index in range(len(groups)))
    return Choice(budget, tuple(groups), schemes, kl, key)


def _bytes(target: Target, scheme: Scheme) -> int:
    return replace(target, scheme=scheme).bytes


@dataclass(frozen=True)
class Share:
    """What one scheme was chosen for: how many layers, bytes and weights of the model, and layers by kind."""

    scheme: Scheme
    layers: int
    bytes: int
    elements: int
    kinds: dict[str, int]

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.elements


def shares(choice: Choice, plan: Plan) -> list[Share]:
    """By scheme, from few bits to many. `plan` is the one made with the choice."""
    layers = choice.layers()
    members: dict[Scheme, list[Target]] = {}
    for target in plan.block_targets:
        if target.module in layers:
            members.setdefault(target.scheme, []).append(target)
    found = [
        Share(
            scheme,
            len(targets),
            sum(t.bytes for t in targets),
            sum(t.elements for t in targets),
            dict(Counter(t.module.rpartition(".")[2] for t in targets)),
        )
        for scheme, targets in members.items()
    ]
    return sorted(found, key=lambda share: share.bits)


SHARES = ("scheme", "true bits", "layers", "weights", "which")


def share_cells(choice: Choice, plan: Plan) -> list[tuple[str, ...]]:
    """The choice as a table, under SHARES."""
    total = sum(target.elements for target in plan.block_targets)
    return [
        (
            str(share.scheme),
            f"{share.bits:.3f}",
            str(share.layers),
            f"{100 * share.elements / total:.1f} %",
            ", ".join(f"{kind} {count}" for kind, count in share.kinds.items()),
        )
        for share in shares(choice, plan)
    ]


# ---- the recipe


def with_choice(recipe: Recipe, choice: Choice, plan: Plan, model: PreTrainedModel) -> Recipe:
    """The recipe with the scheme chosen most often as its own, and overrides behind the user's for all other layers."""
    weights: Counter[Scheme] = Counter()
    kinds: dict[Scheme, dict[str, None]] = {}
    layers = choice.layers()
    for target in plan.block_targets:
        if target.module in layers:
            scheme = layers[target.module]
            weights[scheme] += target.elements
            kinds.setdefault(scheme, {})[kind_of_layer(target)] = None
    base = weights.most_common(1)[0][0]
    blocks = [block.name for block in find_blocks(model)]
    start = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    found = tuple((pattern_of(list(kinds[s]), blocks, start), s) for s in choice.budget.candidates if s in kinds)
    return replace(recipe, scheme=base, overrides=recipe.overrides + tuple(p for p in found if p[1] != base))


def pattern_of(names: Sequence[str], blocks: Sequence[str], start: str = "") -> str:
    """A regular expression of exactly these layers: for each set of linears, the numbers of the blocks that have it.

    A `*` stands for any number, as of an expert. `start`, such as "model.", may be missing: so are names where the
    model is loaded without its head.
    """
    found: dict[tuple[str, str], list[str]] = {}  # (list of blocks, linear inside) -> numbers
    for name in names:
        block = next(block for block in blocks if name.startswith(f"{block}."))
        place, _, number = block.rpartition(".")
        found.setdefault((place, name.removeprefix(f"{block}.")), []).append(number)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (place, linear), numbers in found.items():
        merged.setdefault((place, tuple(numbers)), []).append(linear)
    parts = []
    for (place, numbers_of), linears in merged.items():
        optional = f"(?:{re.escape(start)})?" if start and place.startswith(start) else ""
        head = optional + re.escape(place.removeprefix(start) if optional else place)
        inside = [re.escape(linear).replace(r"\*", r"\d+") for linear in linears]
        parts.append(rf"{head}\.{_any(numbers_of)}\.{_any(inside)}")
    return f"^{_any(parts)}$"


def _any(patterns: Sequence[str]) -> str:
    return patterns[0] if len(patterns) == 1 else f"(?:{'|'.join(patterns)})"


# ---- measured once


def settle_budget(
    plan: Plan,
    model: PreTrainedModel,
    budget: Budget,
    how: SensitivitySettings,
    file: Path | None,
    progress: Progress | None,
) -> Choice:
    """Measure, unless `file` holds the same measured before, keep it there, and choose."""
    check_budget(plan, budget)
    key = _key(plan, budget, how)
    free = free_targets(plan)
    groups = None if file is None else read_losses(file, key)
    if groups is not None and not _fits(groups, free, budget):
        raise AfpqError(f"{file}: does not hold these layers and candidates; remove it")
    if groups is None:
        place = Path(tempfile.gettempdir()) if file is None else file.parent
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="afpq-", dir=place) as scratch:
                groups = measure_losses(plan, model, free, budget.candidates, how, Path(scratch), progress)
            if file is not None:
                write_json(file, _losses_json(budget.candidates, groups, key))
        except OSError as error:
            raise AfpqError(f"{file or place}: cannot write: {error.strerror or error}") from None
    return choose_schemes(plan, budget, groups, key)


def read_losses(file: Path, key: dict[str, str]) -> list[GroupLosses] | None:
    """What `file` holds, if it was measured on the same; None if there is no such file.

    Raises AfpqError for a file of something else.
    """
    if not file.exists():
        return None
    content = read_json(file)
    found = content.get("measured_on")
    differing = [name for name in key if not isinstance(found, dict) or found.get(name) != key[name]]
    if differing:
        raise AfpqError(
            f"{file}: sensitivities of another {' and another '.join(differing)}; "
            "name another file, or, of a run that was stopped, add --no-resume to measure again"
        )
    try:
        return [
            GroupLosses(tuple(group["layers"]), None if group["losses"] is None else tuple(map(float, group["losses"])))
            for group in content["groups"]
        ]
    except (KeyError, TypeError, ValueError):
        raise AfpqError(f"{file}: holds no sensitivities; remove it") from None


def _fits(groups: Sequence[GroupLosses], targets: Sequence[Target], budget: Budget) -> bool:
    layers = sorted(layer for group in groups for layer in group.layers)
    counts = {len(group.losses) for group in groups if group.losses is not None}
    return layers == sorted(target.module for target in targets) and counts <= {len(budget.candidates)}


def _losses_json(candidates: Sequence[Scheme], groups: Sequence[GroupLosses], key: dict[str, str]) -> dict[str, Any]:
    return {
        "measured_on": key,
        "candidates": list(map(str, candidates)),
        "groups": [{"layers": list(g.layers), "losses": None if g.losses is None else list(g.losses)} for g in groups],
    }


def _key(plan: Plan, budget: Budget, how: SensitivitySettings) -> dict[str, str]:
    """Everything that decides the losses; the number of bits does not."""
    recipe = plan.recipe
    return {
        "version of afpq": __version__,
        "model": checkpoint_digest(plan.checkpoint),
        "setting": digest_value(
            [how.search, how.damp, how.guided, how.seed, recipe.skip, [pattern for pattern, _ in recipe.overrides]]
        ),
        "list of candidates": digest_value([list(map(str, budget.candidates))]),
        "text": digest_value(how.windows.tolist()),
    }
