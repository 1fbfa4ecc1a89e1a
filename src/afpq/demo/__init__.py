# SPDX-License-Identifier: MIT
"""`afpq demo`: the paper's formats on a small model that travels with the package."""
