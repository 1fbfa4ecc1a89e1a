# SPDX-License-Identifier: MIT
"""The commands of `afpq`, a file for each subject; `cli.py` runs them."""
