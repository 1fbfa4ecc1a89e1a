# SPDX-License-Identifier: MIT
"""What every solver gets and returns: one weight with its statistics, and how it was quantized."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from afpq.algorithms.layer_statistics import LayerStatistics
from afpq.algorithms.rtn import quantize_rtn
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme


@dataclass(frozen=True)
class LayerProblem:
    """One weight to quantize.

    Attributes:
        W: the weight [out, in], on the device that computes; float32 with statistics, else any float.
        statistics: None for methods that read none.
        scheme: how the result is stored; fitted already if W is a part of a weight.
        options: of the type in the method's row.
        search: the scale search, a name in SCALE_SEARCHES.
    """

    W: Tensor
    statistics: LayerStatistics | None
    scheme: Scheme | FittedScheme
    options: Any
    search: str

    @cached_property
    def nearest(self) -> QuantizedWeight:
        """W rounded to nearest, columns weighed by their importance. Raises AfpqError for NaN or Inf in W."""
        importance = None if self.statistics is None else self.statistics.importance
        return quantize_rtn(self.W, self.scheme, self.search, importance)

    @property
    def measured(self) -> LayerStatistics:
        """The statistics, for methods that are never called without."""
        assert self.statistics is not None
        return self.statistics


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and how it was found.

    Attributes:
        weight: the result.
        target: the weight [out, in] that was aimed at, float32; errors of outputs are relative to its outputs.
        damp: the damping that the second moment took, if any.
        method, note: the method's name and the reason, if the problem was solved by another than was asked for.
    """

    weight: QuantizedWeight
    target: Tensor
    damp: float | None = None
    method: str | None = None
    note: str | None = None
