# SPDX-License-Identifier: MIT
"""The version of afpq; this file imports nothing."""

__version__ = "0.1.0"
