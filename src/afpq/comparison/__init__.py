# SPDX-License-Identifier: MIT
"""`afpq compare`: schemes, methods and other tools on one model, and the page that shows them."""
