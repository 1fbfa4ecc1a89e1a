# SPDX-License-Identifier: MIT
"""Count the weights of a model's blocks that were not quantized, and warn if they are many.

One rule for all counts, which headers alone can follow: a block's tensors are those with a number in their name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from torch import nn

from afpq.model.blocks import left_linears
from afpq.model.linear import AfpqLinear

LOW_COVERAGE = 0.95  # below it a warning; the small rest of a usual model is convolutions, routers and the like
MAX_KINDS_NAMED = 6  # in a warning


def in_block(name: str) -> bool:
    """Whether a tensor's, or a module's, name contains a number, as those of repeated blocks do."""
    return any(part.isdigit() for part in name.split("."))


def share_quantized(quantized: int, left: Mapping[str, int]) -> float:
    """Return the share of the blocks' weights that is quantized; 0 if the blocks have no weights."""
    return quantized / (quantized + sum(left.values()) or 1)


def kind_of_name(name: str) -> str:
    """Return a name with its numbers as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def kinds_left(weights: Mapping[str, int]) -> dict[str, int]:
    """Sum tensors' weights by kind (the name with its numbers as `*`), the largest first."""
    kinds: dict[str, int] = {}
    for name, count in weights.items():
        kinds[kind_of_name(name)] = kinds.get(kind_of_name(name), 0) + count
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def reasons_text(reasons: Mapping[str, str]) -> str:
    """Return the kinds of linears that cannot be quantized, each with its reason; `reasons`: name -> why."""
    return ", ".join({f"{kind_of_name(name)} ({reason})": None for name, reason in reasons.items()})


def coverage_warning(coverage: float, left: Mapping[str, int], reasons: Mapping[str, str] | None = None) -> str | None:
    """Return a sentence on the weights left as they were, None if they are few.

    `left`: tensor -> weights; `reasons`: name of a linear that cannot be quantized -> why. Such are always named.
    """
    because = f"not quantized: {reasons_text(reasons)}" if reasons else None
    if coverage >= LOW_COVERAGE:
        return because
    kinds = kinds_left(left)
    named = ", ".join(f"{kind} ({count:,})" for kind, count in list(kinds.items())[:MAX_KINDS_NAMED])
    more = f" and {len(kinds) - MAX_KINDS_NAMED} more" if len(kinds) > MAX_KINDS_NAMED else ""
    return (
        f"only {100 * coverage:.1f} % of the blocks' weights are quantized; "
        f"{sum(kinds.values()):,} weights stay as large as they were: {named}{more}"
        + ("" if because is None else f"; {because}")
    )


def warn_of_left(model: nn.Module) -> None:
    """Log that warning for a model whose linears have been replaced."""
    layers = [m for name, m in model.named_modules() if isinstance(m, AfpqLinear) and in_block(name)]
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    left = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and in_block(n)}
    reasons = {name: reason for name, reason in left_linears(model).items() if in_block(name)}
    warning = coverage_warning(share_quantized(quantized, left), left, reasons)
    if warning is not None:
        logging.getLogger("afpq").warning("%s: %s", type(model).__name__, warning)
