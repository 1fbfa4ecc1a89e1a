# SPDX-License-Identifier: MIT
"""Numbers of one weight: formats, schemes, scales, rounding and packing. Tensors in, tensors out."""
