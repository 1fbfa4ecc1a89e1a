# SPDX-License-Identifier: MIT
"""One cell of a comparison: a scheme by a method on one model, what was measured of it, and the file that keeps it.

A file is written whole or not at all, with a fingerprint of everything that decides its figures; a later run of the
same comparison reads it instead of measuring again. Its name has a digest of the fingerprint, so that the same cell
with another text or other settings is another file beside it, and nothing measured is overwritten.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.atomic_files import digest_value, write_json
from afpq.errors import AfpqError
from afpq.evaluation.perplexity import Evaluation
from afpq.numerics.scheme import Scheme, parse_scheme

Fingerprint = dict[str, str]  # what was decided, in words -> a digest of it
CALIBRATION = "calibration text"  # the key that only calibrated cells have


@dataclass(frozen=True)
class Cell:
    """A scheme and one of afpq's methods; or another tool's name for its scheme, and the tool's name."""

    scheme: str
    method: str

    @property
    def ours(self) -> Scheme | None:
        """The scheme as a value; None for another tool's and for the float model."""
        return parse_scheme(self.scheme) if self.method in METHODS else None

    @property
    def is_float(self) -> bool:
        return self == FLOAT

    @property
    def file_name(self) -> str:
        """A name that any file system takes; a digest keeps names apart that are cut off or changed."""
        plain = re.sub(r"[^A-Za-z0-9.+-]", "_", str(self))[:80]
        return plain if plain == str(self).replace(" ", "_") else f"{plain}-{digest_value(str(self))[:8]}"

    def __str__(self) -> str:
        return f"{self.scheme} {self.method}" if self.method else self.scheme


FLOAT = Cell("float", "")


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of one layer's weights, and with calibration of its outputs: rounded, and as it is now."""

    module: str
    weight: float
    output_before: float | None = None
    output: float | None = None


@dataclass(frozen=True)
class Result:
    """The figures measured of a cell.

    `bits_per_weight` counts scales and zero points; `coverage` is the share of the blocks' weights it is about.
    `file_bytes` of the weights' files. `window_losses` and `window_divergences` are means of each window, in nats:
    differences between cells are taken window by window, where most of the noise is common and cancels. `seconds` to
    quantize, None if the run was stopped in between. `speed` of greedy generation, the float model's being 1, and
    `tokens_per_second` of the same; None if it was not measured. `codes` counts how often each code was used.
    `calibration` describes the calibration text, `text` that measured on.
    """

    cell: Cell
    bits_per_weight: float
    coverage: float
    file_bytes: int
    evaluation: Evaluation
    window_losses: tuple[float, ...]
    window_divergences: tuple[float, ...]
    seconds: float | None = None
    speed: float | None = None
    tokens_per_second: float | None = None
    layers: tuple[LayerError, ...] = ()
    codes: tuple[int, ...] = ()
    calibration: str | None = None
    text: str | None = None

    @property
    def kl(self) -> float:
        """KL divergence from the float model in nats per token; 0 for the float model itself."""
        return self.evaluation.kl_divergence or 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "evaluation": self.evaluation.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """Invert `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        figures = dict(value["evaluation"])
        if figures["standard_error"] is None:
            figures["standard_error"] = math.nan
        if figures["kl_divergence"] is not None and figures["kl_standard_error"] is None:
            figures["kl_standard_error"] = math.nan
        changed = {
            "cell": Cell(**value["cell"]),
            "evaluation": Evaluation(**figures),
            "window_losses": tuple(value["window_losses"]),
            "window_divergences": tuple(value["window_divergences"]),
            "layers": tuple(LayerError(**layer) for layer in value["layers"]),
            "codes": tuple(value["codes"]),
        }
        return cls(**{**value, **changed})


def place_of(directory: Path, cell: Cell, fingerprint: Fingerprint) -> Path:
    """The file of a cell that this decides."""
    return directory / f"{cell.file_name}-{digest_value(fingerprint)[:8]}.json"


def save(directory: Path, result: Result, fingerprint: Fingerprint) -> None:
    """Write a cell's file. Raises AfpqError if that is not possible."""
    path = place_of(directory, result.cell, fingerprint)
    try:
        write_json(path, {"fingerprint": fingerprint, "result": result.to_json()})
    except OSError as error:
        raise AfpqError(f"{path}: cannot write: {error.strerror or error}") from None


def load(path: Path) -> tuple[Result, Fingerprint] | None:
    """Read a cell's file; None if it is missing or not a cell's."""
    try:
        value = json.loads(path.read_text("utf-8"))
        return Result.from_json(value["result"]), dict(value["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Kept:
    """A cell that a run measured, and what decided it."""

    path: Path
    result: Result
    fingerprint: Fingerprint


def load_all(directory: Path) -> list[Kept]:
    """Read every cell's file of a directory, the newest first; also those that earlier versions named otherwise."""
    paths = sorted(directory.glob("*.json"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    return [Kept(path, *found) for path in paths if (found := load(path)) is not None]


def changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Return the keys that differ between two fingerprints."""
    return [key for key in {**new, **old} if old.get(key) != new.get(key)]
