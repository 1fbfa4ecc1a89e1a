# SPDX-License-Identifier: MIT
"""Choose one option for each group, so that the losses' sum is least and the costs' sum stays within a budget.

This solves the multiple-choice knapsack problem exactly, by dynamic programming over the undominated partial sums (no
other is both cheaper and better) that can still beat the best known choice. The bound comes from a price of cost (a
Lagrange multiplier): the groups still to come add at least the sum of their minima to loss + price * cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from afpq.errors import AfpqError

MAX_PARTIAL_SUMS = 2**16  # above it the result is not exact; no model's problem comes near
PRICE_HALVINGS = 200


def choose_options(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Choose an option k for each group g, given `costs[g][k]` (whole numbers >= 0) and `losses[g][k]`.

    Raises AfpqError if even the cheapest options cost more than the budget.
    """
    C = [torch.tensor(row, dtype=torch.float64) for row in costs]  # whole numbers below 2^53 are exact in it
    L = [torch.tensor(row, dtype=torch.float64) for row in losses]
    least = _behind([float(c.min()) for c in C])
    if least[0] > budget:
        raise AfpqError(f"the cheapest options cost {int(least[0])}, more than the budget of {budget}")
    price, best_known = _price(C, L, budget)
    bound = _behind([float((loss + price * cost).min()) for cost, loss in zip(C, L)])
    limit = best_known + price * budget
    limit += 1e-9 * abs(limit)  # sums are rounded
    cost, loss = torch.zeros(2, 1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []  # (partial sum before, option) of each partial sum
    for group, (c, value) in enumerate(zip(C, L), 1):
        costs_now, losses_now = (cost[:, None] + c).flatten(), (loss[:, None] + value).flatten()
        hopeful = (costs_now + least[group] <= budget) & (losses_now + price * costs_now + bound[group] <= limit)
        kept = _useful(costs_now, losses_now, hopeful.nonzero()[:, 0])
        cost, loss = costs_now[kept], losses_now[kept]
        steps.append((kept // len(c), kept % len(c)))
    chosen, place = [], len(cost) - 1  # the most expensive sum kept is the best
    for before, option in reversed(steps):
        chosen.append(int(option[place]))
        place = int(before[place])
    return chosen[::-1]


def _behind(values: Sequence[float]) -> list[float]:
    """Return the sum of all values from each place on; 0 after the last."""
    sums = [0.0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _useful(costs: Tensor, losses: Tensor, places: Tensor) -> Tensor:
    """Keep the sums at `places` that are better than all cheaper or equally cheap ones, in ascending cost."""
    places = places[losses[places].argsort(stable=True)]
    places = places[costs[places].argsort(stable=True)]
    found = losses[places]
    best = torch.cat([found.new_full((1,), torch.inf), found.cummin(0).values[:-1]])
    places = places[found < best]
    if len(places) > MAX_PARTIAL_SUMS:
        places = places[torch.linspace(0, len(places) - 1, MAX_PARTIAL_SUMS).round().long()]
    return places


def _price(C: list[Tensor], L: list[Tensor], budget: int) -> tuple[float, float]:
    """Bisect for the lowest price at which the options of least loss + price * cost fit the budget; and their loss."""
    costs = pad_sequence(C, batch_first=True)  # [groups, options]; padding has an infinite loss
    losses = pad_sequence(L, batch_first=True, padding_value=torch.inf)

    def at(price: float) -> tuple[float, float]:
        total = losses + price * costs
        best = torch.where(total == total.min(1, keepdim=True).values, costs, torch.inf).argmin(1, keepdim=True)
        return float(costs.gather(1, best).sum()), float(losses.gather(1, best).sum())

    cost, loss = at(0.0)
    if cost <= budget:
        return 0.0, loss
    # One unit of cost never buys more than all losses together.
    low, high = 0.0, 1.0 + sum(float(value.max() - value.min()) for value in L)
    for _ in range(PRICE_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)[0] <= budget else (middle, high)
    return high, at(high)[1]
