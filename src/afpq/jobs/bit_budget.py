# SPDX-License-Identifier: MIT
"""A budget of bits: choose a scheme for each group of layers so that the predicted KL of the model is least.

The schemes to choose from are data (CANDIDATES, or the user's). The cost of each in each group is measured
(`sensitivity.py`) and kept in a file, so that another budget, or a run that was stopped, need not measure again. The
choice becomes overrides of the recipe (`chosen_overrides.py`), as if the user had named every layer.
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

from afpq.calibration.sensitivity import GroupLosses, SensitivitySettings, measure_losses
from afpq.checkpoint.atomic_files import digest_value, write_json
from afpq.checkpoint.fingerprint import DRAWN_BY, SETTINGS, TEXT
from afpq.checkpoint.plan import Plan, Target
from afpq.checkpoint.verify import checkpoint_digest
from afpq.errors import AfpqError
from afpq.jobs.knapsack import choose_options
from afpq.jobs.sensitivity_file import losses_to_json, read_losses
from afpq.numerics.scheme import Scheme, parse_scheme
from afpq.progress import Progress
from afpq.version import __version__

# From 2.25 to 4.5 true bits in small steps; not 8 bits, which has no fast kernel.
CANDIDATES = (
    "nf2-asym-g64-log8", "nf2-asym-g32-log8",
    "nf3-sym-g128-log8", "nf3-sym-g64-log8", "nf3-asym-g64-log8", "nf3-asym-g32-log8",
    "nf4-sym-g128-log8", "nf4-sym-g64-log8", "nf4-asym-g64-log8", "nf4-asym-g32-log8",
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """The most true bits, scales included, per quantized weight of the blocks, and the schemes to choose from."""

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
    """Make a user's budget; None for no budget. Raises AfpqError for candidates without one, or invalid ones."""
    if bits_per_weight is None:
        if candidates is not None:
            raise AfpqError("candidates (--candidates) are for a budget of bits: give --bits-per-weight too")
        return None
    if candidates is None:
        return Budget(bits_per_weight)
    return Budget(bits_per_weight, tuple(parse_scheme(c) if isinstance(c, str) else c for c in candidates))


@dataclass(frozen=True)
class Choice:
    """A scheme for each group. `kl`: predicted divergence from the float model in nats per token, a rough figure.

    `key` identifies the measurement; the groups' losses are in the order of the budget's candidates.
    """

    budget: Budget
    groups: tuple[GroupLosses, ...]
    schemes: tuple[Scheme, ...]
    kl: float
    key: dict[str, Any]

    def layers(self) -> dict[str, Scheme]:
        """Return the scheme of every layer."""
        return {layer: scheme for group, scheme in zip(self.groups, self.schemes) for layer in group.layers}

    def to_json(self) -> dict[str, Any]:
        """Return the content of a result's file SENSITIVITIES; `read_losses` reads it."""
        return {
            **losses_to_json(self.budget.candidates, self.groups, self.key),
            "bits_per_weight": self.budget.bits_per_weight,
            "predicted_kl": self.kl,
            "chosen": list(map(str, self.schemes)),
        }


def free_targets(plan: Plan) -> list[Target]:
    """Return the linears of the blocks without an override of the user."""
    patterns = [pattern for pattern, _ in plan.recipe.overrides]
    return [t for t in plan.block_targets if not any(re.search(pattern, t.module) for pattern in patterns)]


def check_budget(plan: Plan, budget: Budget) -> None:
    """Raise AfpqError, before anything is measured, if no choice of schemes can have so many bits."""
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


def choose_schemes(plan: Plan, budget: Budget, groups: Sequence[GroupLosses], key: dict[str, Any]) -> Choice:
    """Choose the schemes of least predicted KL; layers that text does not reach get the most bits within the budget."""
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


def settle_budget(
    plan: Plan,
    model: PreTrainedModel,
    budget: Budget,
    how: SensitivitySettings,
    file: Path | None,
    progress: Progress | None,
) -> Choice:
    """Choose schemes by losses from `file`, or measure them and write them there."""
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
                write_json(file, losses_to_json(budget.candidates, groups, key))
        except OSError as error:
            raise AfpqError(f"{file or place}: cannot write: {error.strerror or error}") from None
    return choose_schemes(plan, budget, groups, key)


def _fits(groups: Sequence[GroupLosses], targets: Sequence[Target], budget: Budget) -> bool:
    layers = sorted(layer for group in groups for layer in group.layers)
    counts = {len(group.losses) for group in groups if group.losses is not None}
    return layers == sorted(target.module for target in targets) and counts <= {len(budget.candidates)}


def _key(plan: Plan, budget: Budget, how: SensitivitySettings) -> dict[str, Any]:
    """Return everything that decides the losses, which the number of bits does not."""
    recipe = plan.recipe
    return {
        "version of afpq": __version__,
        "model": checkpoint_digest(plan.checkpoint),
        SETTINGS: {
            "scale search": how.search,
            "damp": how.damp,
            "use of gradients": how.guided,
            DRAWN_BY[2]: how.seed,
            "list of skips": list(recipe.skip),
            "list of overridden layers": [pattern for pattern, _ in recipe.overrides],
            "list of candidates": list(map(str, budget.candidates)),
        },
        TEXT: digest_value(how.windows.tolist()),
    }
