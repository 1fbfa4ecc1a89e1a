# SPDX-License-Identifier: MIT
"""Load a model and measure it: devices, memory, text, perplexity, KL divergence and benchmarks."""
