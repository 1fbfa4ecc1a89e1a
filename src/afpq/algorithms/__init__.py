# SPDX-License-Identifier: MIT
"""Solvers: (weight [out, in], statistics, scheme) -> QuantizedWeight. Tensors in, tensors out, never a module."""

from afpq.algorithms.awq import search_channel_scales, search_clips
from afpq.algorithms.float_target import toward_float_outputs
from afpq.algorithms.gptq import SingularHessian, quantize_gptq
from afpq.algorithms.guided_gptq import quantize_guided
from afpq.algorithms.layer_statistics import LayerStatistics
from afpq.algorithms.rtn import quantize_rtn
from afpq.algorithms.scheme_fitting import fit_scheme

__all__ = [
    "LayerStatistics",
    "SingularHessian",
    "fit_scheme",
    "quantize_gptq",
    "quantize_guided",
    "quantize_rtn",
    "search_channel_scales",
    "search_clips",
    "toward_float_outputs",
]
