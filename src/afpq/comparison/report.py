# SPDX-License-Identifier: MIT
"""Write a comparison: report.html to look at, report.md to paste, report.json to compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from afpq.checkpoint.atomic_files import write_json, write_whole
from afpq.comparison.cells import Result
from afpq.comparison.distributions import Asymmetry
from afpq.comparison.findings import sentences
from afpq.comparison.html_page import page
from afpq.comparison.rows import About, in_order, markdown
from afpq.errors import AfpqError


def write_comparison(
    directory: Path, about: About, results: Sequence[Result], groups: Sequence[Asymmetry]
) -> list[Path]:
    """Write the files and return their paths. `results` starts with the float model. Raises AfpqError on failure."""
    title, findings = f"{about.model}: {len(results) - 1} ways to quantize it", sentences(results)
    written = [directory / f"report.{kind}" for kind in ("html", "md", "json")]
    try:
        write_whole(written[0], page(title, findings, about, results, groups).encode())
        write_whole(written[1], markdown(title, findings, about, results).encode())
        value = {
            "title": title,
            "findings": findings,
            "measured": about.lines(),
            "cells": [result.to_json() for result in in_order(results)],
            "asymmetry": [asdict(group) for group in groups],
        }
        write_json(written[2], value)
    except OSError as error:
        raise AfpqError(f"{directory}: cannot write the report: {error.strerror or error}") from None
    return written
