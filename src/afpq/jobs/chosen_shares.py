# SPDX-License-Identifier: MIT
"""The schemes chosen for a bit budget as a table: the share of the model that each got."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from afpq.checkpoint.plan import Plan, Target
from afpq.jobs.bit_budget import Choice
from afpq.numerics.scheme import Scheme


@dataclass(frozen=True)
class Share:
    """The layers, bytes and weights of the model with one chosen scheme; `kinds` counts layers by kind."""

    scheme: Scheme
    layers: int
    bytes: int
    elements: int
    kinds: dict[str, int]

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.elements


def shares(choice: Choice, plan: Plan) -> list[Share]:
    """Return the shares in ascending bits; `plan` is the one made with the choice."""
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
    """Return the choice as rows of a table with the header SHARES."""
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
