# SPDX-License-Identifier: MIT
"""Round to nearest: every weight takes its closest value, whatever its neighbours do. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from afpq.algorithms.learned_codebooks import with_codebook
from afpq.errors import AfpqError
from afpq.numerics.groups import GroupScales, QuantizedWeight, encode, fit_scales, with_grid
from afpq.numerics.scale_search import SCALE_SEARCHES, search_scales
from afpq.numerics.scheme import Scheme

CHUNK = 2**18  # weights rounded at a time: temporaries of this size stay in the cache


def quantize_rtn(
    weight: Tensor, scheme: Scheme, scale_search: str = "absmax", importance: Tensor | None = None
) -> QuantizedWeight:
    """Any float [out, in] -> QuantizedWeight, on the weight's device.

    `importance` [in] weighs the columns in the "mse" search and in learning a book. Raises AfpqError for NaN, Inf, or
    an empty or non-matrix weight.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise AfpqError(f"expected a matrix with at least one weight, got shape {tuple(weight.shape)}")
    if scale_search not in SCALE_SEARCHES:
        raise AfpqError(f"scale search {scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")
    scheme = with_grid(weight, with_codebook(weight, scheme, scale_search, importance))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found: list[GroupScales] = []
    for first in range(0, len(weight), max(1, CHUNK // weight.shape[1])):
        rows = slice(first, first + max(1, CHUNK // weight.shape[1]))
        x = weight[rows].float()
        scales = fit_scales(x, scheme) if scale_search == "absmax" else search_scales(x, scheme, importance)
        codes[rows] = encode(x, scales, scheme)
        found.append(scales)
    pos = torch.cat([s.pos for s in found])
    neg = torch.cat([s.neg for s in found]) if scheme.two_scales else pos
    zero = torch.cat([s.zero for s in found if s.zero is not None]) if scheme.zero_point else None
    return QuantizedWeight(codes, GroupScales(pos, neg, zero), scheme)


def quantize_named(name: str, weight: Tensor, scheme: Scheme, scale_search: str) -> QuantizedWeight:
    """One weight [out, in], any float, rounded to nearest. Raises AfpqError that starts with `name`."""
    try:
        return quantize_rtn(weight, scheme, scale_search)
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None
