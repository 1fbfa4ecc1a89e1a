# SPDX-License-Identifier: MIT
"""Run a model block by block on text and solve its layers with the hidden states, second moments and gradients."""
