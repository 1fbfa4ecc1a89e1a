# SPDX-License-Identifier: MIT
"""Options of solvers: frozen dataclasses whose fields carry the help text, command-line flag and JSON key.

The command line and `quantization_config` are generated from the fields, so a new option is one new field.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from afpq.errors import AfpqError

ORDERS = ("group", "act", "none")
T = TypeVar("T")


def option(default: T, help: str, *, flag: str | None = None, json: str | None = None, saved: bool = True) -> T:
    """A dataclass field that is an option of a solver.

    `flag` is the command line's (default: `--name`, or `--name/--no-name` for a bool), `json` the key in
    `quantization_config` (default: the field's name). An option that is not `saved` has no key there.
    """
    found: T = field(default=default, metadata={"help": help, "flag": flag, "json": json, "saved": saved})
    return found


@dataclass(frozen=True)
class SolverOptions:
    """Base of all solvers' options; has none itself."""


def flag_of(part: Field[Any]) -> str:
    """The command-line flag of an option's field, such as `--damp` or `--sequential/--no-sequential`."""
    name = part.name.replace("_", "-")
    given: str | None = part.metadata["flag"]
    return given or (f"--{name}/--no-{name}" if isinstance(part.default, bool) else f"--{name}")


def options_to_json(options: SolverOptions) -> dict[str, Any]:
    """The saved options by their JSON keys, in the order of the fields."""
    return {
        part.metadata["json"] or part.name: getattr(options, part.name)
        for part in fields(options)
        if part.metadata["saved"]
    }


@dataclass(frozen=True)
class GptqOptions(SolverOptions):
    """Options of GPTQ and guided GPTQ. Raises AfpqError for an unknown order or a number out of range.

    `damp`: share of the Hessian's mean diagonal added to it. `order` of the columns: "group" (whole groups by
    importance, columns by importance inside), "act" (all columns, scales fixed beforehand) or "none". `sweeps` of
    coordinate descent afterwards. `float_target`: aim at the float model's outputs instead of repeating the errors of
    earlier layers. `sequential`: a layer reads the outputs of the quantized layers before it inside its block too.
    """

    damp: float = option(0.01, "GPTQ: share of the mean diagonal added to the Hessian.", json="damp_percent")
    order: str = option("group", "GPTQ: order of the columns: group, act or none.")
    sweeps: int = option(3, "GPTQ: rounds of coordinate descent afterwards.")
    float_target: bool = option(True, "GPTQ: aim at the float model's outputs.")
    sequential: bool = option(True, "GPTQ: quantize a block's layers one after the other.", json="true_sequential")

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise AfpqError(f"order {self.order!r}; known: {', '.join(ORDERS)}")
        if not 0 < self.damp < 1:
            raise AfpqError(f"damp {self.damp}: use a number between 0 and 1")
        if self.sweeps < 0:
            raise AfpqError(f"sweeps {self.sweeps}: use a positive number, or 0 for none")


@dataclass(frozen=True)
class AwqOptions(SolverOptions):
    """The option of AWQ without GPTQ: `sequential`, as in `GptqOptions`."""

    sequential: bool = option(True, "AWQ: quantize a block's layers one after the other.", saved=False)
