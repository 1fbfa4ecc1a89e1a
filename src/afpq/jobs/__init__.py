# SPDX-License-Identifier: MIT
"""Whole jobs that make a directory: quantize, export, import; their estimate, self-test and cards."""
