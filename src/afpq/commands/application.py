# SPDX-License-Identifier: MIT
"""The application with all its commands."""

from __future__ import annotations

from afpq.commands import compare, evaluate, export_import, generate, inspect, quantize, verify_files
from afpq.commands.options import app as app

COMMANDS = (
    quantize,
    inspect,
    evaluate,
    generate,
    compare,
    export_import,
    verify_files,
)
