# SPDX-License-Identifier: MIT
"""The file of measured sensitivities: groups of layers, and the loss of each candidate scheme in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afpq.calibration.sensitivity import GroupLosses
from afpq.checkpoint.fingerprint import differences
from afpq.checkpoint.reader import read_json
from afpq.errors import AfpqError
from afpq.numerics.scheme import Scheme

SENSITIVITIES = "afpq_sensitivities.json"  # in a result whose schemes were chosen: the measurements and the choice


def losses_to_json(candidates: Sequence[Scheme], groups: Sequence[GroupLosses], key: dict[str, Any]) -> dict[str, Any]:
    """Return the file's content; `key` identifies the measurement."""
    return {
        "measured_on": key,
        "candidates": list(map(str, candidates)),
        "groups": [{"layers": list(g.layers), "losses": None if g.losses is None else list(g.losses)} for g in groups],
    }


def read_losses(file: Path, key: dict[str, Any]) -> list[GroupLosses] | None:
    """Read the losses in `file`; None if there is no such file.

    Raises AfpqError if they were measured on something else than `key`, and for another kind of file.
    """
    if not file.exists():
        return None
    content = read_json(file)
    found = content.get("measured_on")
    differing = differences(found, key)
    if differing:
        raise AfpqError(
            f"{file}: sensitivities of another {' and another '.join(differing)}; "
            "name another file, or, of a run that was stopped, add --no-resume to measure again"
        )
    try:
        return [
            GroupLosses(tuple(group["layers"]), None if group["losses"] is None else tuple(map(float, group["losses"])))
            for group in content["groups"]
        ]
    except (KeyError, TypeError, ValueError):
        raise AfpqError(f"{file}: holds no sensitivities; remove it") from None
