# SPDX-License-Identifier: MIT
"""Solvers: (weight [out, in], statistics, scheme) -> QuantizedWeight. Tensors in, tensors out, never a module."""

from afpq.algorithms.awq import search_channel_scales, search_clips
from afpq.algorithms.float_target import toward_float_outputs
from afpq.algorithms.gptq import SingularHessian, quantize_gptq
from afpq.algorithms.learned_codebooks import with_book
from afpq.algorithms.rtn import quantize_rtn
from afpq.algorithms.two_sided_gptq import quantize_two_sided

__all__ = [
    "SingularHessian",
    "quantize_gptq",
    "quantize_rtn",
    "quantize_two_sided",
    "search_channel_scales",
    "search_clips",
    "toward_float_outputs",
    "with_book",
]
