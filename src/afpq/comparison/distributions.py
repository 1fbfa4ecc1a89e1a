# SPDX-License-Identifier: MIT
"""What weights look like to a quantizer: how lopsided groups are, and how often each code is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from afpq.numerics.formats import FORMATS
from afpq.numerics.groups import extremes
from afpq.numerics.scheme import Scheme

T = TypeVar("T")

EDGE = 2.0  # histograms reach from log2 ratio -2 to 2; what lies beyond is counted in the outermost bins
BINS = 40
SAMPLED_LAYERS, SAMPLED_ROWS = 48, 512  # what is counted at most, of each model and of each layer
LOPSIDED = 1.1  # a group counts as lopsided if one side reaches further than the other by this factor


@dataclass(frozen=True)
class Asymmetry:
    """A histogram over groups of `group_size` weights: counts of log2(max / |min|) in BINS bins over [-EDGE, EDGE].

    `lopsided` is the share of groups whose longer side is LOPSIDED times the shorter one or more, or that have only
    one side. Groups of zeros are left out.
    """

    group_size: int
    counts: tuple[int, ...]
    lopsided: float


def asymmetry(weights: Sequence[Tensor], group_size: int) -> Asymmetry:
    """Count over float weights [rows, in]. Raises AfpqError for NaN or Inf."""
    scheme = Scheme(FORMATS["nf4"], group_size)
    ratios = torch.cat([log_ratios(weight, scheme) for weight in weights])
    counts = torch.histc(ratios.clamp(-EDGE, EDGE), BINS, -EDGE, EDGE).long()
    lopsided = (ratios.abs() >= torch.tensor(LOPSIDED).log2()).double().mean().item() if len(ratios) else 0.0
    return Asymmetry(group_size, tuple(counts.tolist()), lopsided)


def log_ratios(weight: Tensor, scheme: Scheme) -> Tensor:
    """Compute log2(max / |min|) of every group that is not all zero, float32 [n]; infinite if a side has no weights."""
    low, high = (side.flatten() for side in extremes(weight.float(), scheme))
    some = (low > 0) | (high > 0)
    return high[some].log2() - low[some].log2()


def code_counts(codes: Tensor, size: int) -> Tensor:
    """Count how often each of `size` codes is in a tensor of codes, int64 [size]."""
    return torch.bincount(codes.flatten(), minlength=size)


def entropy(counts: Sequence[int]) -> float:
    """Compute the bits a code carries on average; equal to its width only if all codes are used alike."""
    share = torch.tensor(counts, dtype=torch.float64)
    share = share[share > 0] / share.sum()
    return -(share * share.log2()).sum().item() + 0.0  # + 0.0 turns -0.0 into 0.0


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many of the items, at equal distances."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def some_rows(weight: Tensor, most: int) -> Tensor:
    """Return at most so many rows of [rows, in], at equal distances."""
    return weight[spread(range(len(weight)), most)]
