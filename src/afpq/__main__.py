# SPDX-License-Identifier: MIT
"""`python -m afpq`."""

from afpq.cli import main

main()
