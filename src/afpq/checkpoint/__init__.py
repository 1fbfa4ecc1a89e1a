# SPDX-License-Identifier: MIT
"""Read, plan, write, lock and verify a model on disk."""
