# SPDX-License-Identifier: MIT
"""Thin adapters to other libraries, one file each, imported only when wanted."""
