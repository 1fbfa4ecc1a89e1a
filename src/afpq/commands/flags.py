# SPDX-License-Identifier: MIT
"""Parameters of a command in groups: dataclasses whose fields, and solver options whose fields, become flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer

from afpq.algorithms.methods import METHODS
from afpq.algorithms.solver_options import SolverOptions, flag_of
from afpq.commands.options import with_signature

Parameters = Sequence[inspect.Parameter]


def option_parameters(kinds: Iterable[type[SolverOptions]]) -> list[inspect.Parameter]:
    """One command-line parameter for each field of these dataclasses; of two fields of one name, the first."""
    found: dict[str, inspect.Parameter] = {}
    for kind in kinds:
        types = get_type_hints(kind)
        for part in fields(kind):
            words = typer.Option(flag_of(part), help=part.metadata["help"])
            annotation: Any = Annotated.__class_getitem__((types[part.name], words))  # type: ignore[attr-defined]
            found.setdefault(part.name, _parameter(part.name, annotation, part.default))
    return list(found.values())


def option_types() -> list[type[SolverOptions]]:
    """The types of options of all methods."""
    return list(dict.fromkeys(method.options for method in METHODS.values()))


def options_of(method: str, values: Mapping[str, Any]) -> SolverOptions | None:
    """The options of a method from the values of all flags; None for an unknown method.

    Raises AfpqError for bad values, also of options that the method does not take.
    """
    made = {kind: kind(**{p.name: values[p.name] for p in fields(kind) if p.name in values}) for kind in option_types()}
    return made[METHODS[method].options] if method in METHODS else None


def with_flags(**groups: Parameters) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function some of whose parameters are groups of flags.

    A parameter annotated with a dataclass is replaced by one for each of its fields, and the function gets an
    instance; one named in `groups` by the parameters given there, and the function gets a dictionary.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        kinds: dict[str, Callable[..., Any]] = {}
        members: dict[str, list[str]] = {}
        flat: list[inspect.Parameter] = []
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in inspect.signature(function).parameters.items():
            kind = hints[name]
            if name in groups or is_dataclass(kind):
                inside = list(groups[name]) if name in groups else list(_fields_as_parameters(kind))
                kinds[name], members[name] = dict if name in groups else kind, [p.name for p in inside]
                flat += inside
            else:
                flat.append(_parameter(name, kind, parameter.default))

        @wraps(function)
        def command(**values: Any) -> None:
            made = {name: kinds[name](**{p: values.pop(p) for p in members[name]}) for name in kinds}
            function(**values, **made)

        return with_signature(command, flat)

    return decorate


def _fields_as_parameters(kind: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for part in fields(kind):
        default = inspect.Parameter.empty if part.default is MISSING else part.default
        yield _parameter(part.name, hints[part.name], default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
