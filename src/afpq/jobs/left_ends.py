# SPDX-License-Identifier: MIT
"""The embedding and the head that a plan leaves as they are: their share of the model, and what to quantize saves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from afpq.checkpoint.plan import Plan
from afpq.evaluation.tables import size_text
from afpq.model.embedding_and_head import scales_its_rows
from afpq.numerics.packing import packed_bytes

LARGE = 0.05  # of all weights: below it, nothing is stated


@dataclass(frozen=True)
class LeftEnd:
    """An end that is left: its modules, the share of all weights, and the option that quantizes it.

    `saved`: the bytes that the option saves in the scheme of the blocks; None if the end cannot be quantized.
    """

    modules: tuple[str, ...]
    share: float
    option: str
    saved: int | None

    def sentence(self) -> str:
        """Return one line on it."""
        name, *others = self.modules
        words = f"{name} (and {others[0]}, tied to it)" if others else name
        what = f"{words}: {100 * self.share:.1f} % of the weights"
        return what if self.saved is None else f"{what}; {self.option} would save {size_text(self.saved)}"


def left_ends(plan: Plan, model: nn.Module) -> list[LeftEnd]:
    """Return the ends that stay as they are and hold a large share of the weights; a tied pair is one."""
    infos, ends = plan.checkpoint.tensors, plan.ends
    total = sum(info.elements for info in infos.values())
    quantized = {target.module for target in plan.end_targets}
    options = [(ends.embedding, "--embedding"), (None if ends.tied else ends.head, "--lm-head")]
    found = []
    for module, option in options:
        place = plan.names.get(f"{module}.weight")
        if module is None or place is None or module in quantized:
            continue
        info = infos[place.tensor]
        if info.elements < LARGE * total or len(info.shape) != 2:
            continue
        modules = (module, ends.head) if ends.tied and ends.head is not None else (module,)
        smaller = packed_bytes(plan.recipe.scheme, info.shape[0], info.shape[1])
        possible = option == "--lm-head" or _can_be_quantized(plan, model, module)
        found.append(LeftEnd(modules, info.elements / total, option, info.bytes - smaller if possible else None))
    return found


def _can_be_quantized(plan: Plan, model: nn.Module, embedding: str) -> bool:
    lookup = model.get_submodule(embedding)
    return not plan.ends.sharers and isinstance(lookup, nn.Embedding) and scales_its_rows(lookup)
