# SPDX-License-Identifier: MIT
"""Options of solvers as values: checked once, saved with a result, made into options of the command line."""

from __future__ import annotations

from dataclasses import dataclass

from afpq.errors import AfpqError

ORDERS = ("group", "act", "none")


@dataclass(frozen=True)
class GptqOptions:
    """The options of GPTQ.

    - `damp`: share of the Hessian's mean diagonal added to it, between 0 and 1
    - `order` of the columns: "group" (whole groups by importance, columns by importance inside), "act" (all columns,
      scales fixed beforehand) or "none"
    - `sweeps` of coordinate descent afterwards
    - `float_target`: aim at the float model's outputs instead of repeating the errors of earlier layers
    - `sequential`: a layer sees the quantized layers before it inside its block too

    Raises AfpqError for a value out of range.
    """

    damp: float = 0.01
    order: str = "group"
    sweeps: int = 3
    float_target: bool = True
    sequential: bool = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise AfpqError(f"order {self.order!r}; known: {', '.join(ORDERS)}")
        if not 0 < self.damp < 1 or self.sweeps < 0:
            raise AfpqError(f"damp {self.damp} must lie between 0 and 1, sweeps {self.sweeps} must not be negative")
