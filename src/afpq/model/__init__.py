# SPDX-License-Identifier: MIT
"""A model in memory: its blocks, linears, experts, embedding and head, and packed modules in their place."""
