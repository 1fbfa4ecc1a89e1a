# SPDX-License-Identifier: MIT
"""A model run block by block on text: hidden states, second moments, gradients, and layers solved with them."""
