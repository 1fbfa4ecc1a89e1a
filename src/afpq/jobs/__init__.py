# SPDX-License-Identifier: MIT
"""Quantize, export and import whole models: jobs that write a directory, estimate it, check it and describe it."""
