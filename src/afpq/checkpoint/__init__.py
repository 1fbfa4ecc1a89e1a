# SPDX-License-Identifier: MIT
"""A model on disk: reading, planning, writing, locking and verifying."""
