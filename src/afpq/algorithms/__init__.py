# SPDX-License-Identifier: MIT
"""Solvers: (float32 weight [out, in], scheme, ...) -> QuantizedWeight. Tensors in, tensors out, never a module."""

from afpq.algorithms.rtn import quantize_rtn

__all__ = ["quantize_rtn"]
