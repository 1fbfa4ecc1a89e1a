# SPDX-License-Identifier: MIT
"""A scheme settled for a weight: its codebook learned if its format is learned, its grid of scales fitted."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from afpq.algorithms.learned_codebooks import learn_codebook
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.scales import fit_grid
from afpq.numerics.scheme import Scheme


def fit_scheme(
    weight: Tensor, scheme: Scheme | FittedScheme, scale_search: str = "mse", importance: Tensor | None = None
) -> FittedScheme:
    """Settle a scheme for a weight [rows, in], any float; one that is fitted already is returned as it is.

    `scale_search` and `importance`, float [in] >= 0, matter for a learned codebook only: see `learn_codebook`. Its grid
    is that of the format it starts from. Raises AfpqError for NaN or Inf, and for weights beyond what the scales'
    storage can reach.
    """
    if isinstance(scheme, FittedScheme):
        return scheme
    start = fit_grid(weight, replace(scheme, format=scheme.format.start))
    return learn_codebook(weight, start, scale_search, importance) if scheme.format.learned else start
