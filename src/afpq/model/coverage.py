# SPDX-License-Identifier: MIT
"""What of a model's blocks was not quantized, and a warning where that is much: a half-quantized model looks whole."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

from torch import nn

from afpq.model.linear import AfpqLinear

LOW_COVERAGE = 0.95  # below it a warning; the small rest of a usual model are convolutions, routers and the like
MOST = 6  # kinds of tensors named in a warning


def kinds_left(weights: Mapping[str, int]) -> dict[str, int]:
    """Tensors by kind, with the numbers in their names as `*`: kind -> how many weights, most first."""
    kinds: dict[str, int] = {}
    for name, count in weights.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        kinds[kind] = kinds.get(kind, 0) + count
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def coverage_warning(coverage: float, left: Mapping[str, int]) -> str | None:
    """A sentence on the weights left as they were, where they are many; `left`: tensor -> weights."""
    if coverage >= LOW_COVERAGE:
        return None
    kinds = kinds_left(left)
    named = ", ".join(f"{kind} ({count:,})" for kind, count in list(kinds.items())[:MOST])
    more = f" and {len(kinds) - MOST} more" if len(kinds) > MOST else ""
    return (
        f"only {100 * coverage:.1f} % of the blocks' weights are quantized; "
        f"{sum(kinds.values()):,} weights stay as large as they were: {named}{more}"
    )


def warn_of_left(model: nn.Module, blocks: Iterable[str]) -> None:
    """Log the warning for a model whose linears have been replaced; `blocks` are the names of its blocks."""
    places = tuple(f"{name}." for name in blocks)
    layers = [m for name, m in model.named_modules() if isinstance(m, AfpqLinear) and name.startswith(places)]
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    left = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n.startswith(places)}
    warning = coverage_warning(quantized / (quantized + sum(left.values()) or 1), left)
    if warning is not None:
        logging.getLogger("afpq").warning("%s: %s", type(model).__name__, warning)
