# SPDX-License-Identifier: MIT
"""Find the blocks, linears, experts, embedding and head of a model in memory, and put packed modules in their place."""
