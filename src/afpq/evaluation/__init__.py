# SPDX-License-Identifier: MIT
"""Load a model and measure it: perplexity, KL divergence and benchmarks."""
