# SPDX-License-Identifier: MIT
"""Round to nearest: every weight takes its closest value, whatever its neighbours do. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from afpq.algorithms.scheme_fitting import fit_scheme
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, encode
from afpq.numerics.scale_search import SCALE_SEARCHES, find_scales
from afpq.numerics.scheme import Scheme

CHUNK = 2**18  # weights rounded at a time: temporaries of this size stay in the cache


def quantize_rtn(
    weight: Tensor, scheme: Scheme | FittedScheme, scale_search: str = "absmax", importance: Tensor | None = None
) -> QuantizedWeight:
    """Round a weight [out, in], any float, to nearest, on its device.

    A plain scheme is fitted to the weight first (`fit_scheme`). `importance` [in] weighs the columns in the "mse"
    search and in the fit of a learned codebook. Raises AfpqError for NaN, Inf, an empty or non-matrix weight, or
    another search.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise AfpqError(f"expected a matrix with at least one weight, got shape {tuple(weight.shape)}")
    if scale_search not in SCALE_SEARCHES:
        raise AfpqError(f"scale search {scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")
    fitted = fit_scheme(weight, scheme, scale_search, importance)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    found: list[GroupScales] = []
    for first in range(0, len(weight), max(1, CHUNK // weight.shape[1])):
        rows = slice(first, first + max(1, CHUNK // weight.shape[1]))
        x = weight[rows].float()
        scales = find_scales(x, fitted, scale_search, importance)
        codes[rows] = encode(x, scales, fitted.scheme)
        found.append(scales)
    return QuantizedWeight(codes, GroupScales.cat(found), fitted.scheme)


def quantize_named(name: str, weight: Tensor, scheme: Scheme, scale_search: str) -> QuantizedWeight:
    """Round one weight [out, in], any float, to nearest. Raises AfpqError that starts with `name`."""
    try:
        return quantize_rtn(weight, scheme, scale_search)
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None
