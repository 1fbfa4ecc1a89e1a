# SPDX-License-Identifier: MIT
"""Options that were given and would have no effect: an error, before any work, in place of silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from afpq.algorithms.methods import METHODS
from afpq.errors import AfpqError


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a run of `afpq quantize` does, as far as options depend on it.

    `text` and `eval_text`: whether such a text was given (`dataset` counts as a text, and has one to measure on too).
    `same_ends`: an end is quantized in the scheme of the options. `measure`: the card may have figures.
    """

    method: str
    budget: bool = False
    end_pass: bool = False
    text: bool = False
    dataset: bool = False
    eval_text: bool = False
    measure: bool = True
    same_ends: bool = False
    device: str = "auto"

    @property
    def calibrated(self) -> bool:
        return METHODS[self.method].calibrated

    @property
    def draws(self) -> bool:
        """Whether windows of the text are drawn to learn from."""
        return self.calibrated or self.budget or self.end_pass

    @property
    def measured(self) -> bool:
        """Whether the card's figures are measured."""
        return self.measure and (self.text or self.eval_text)


def given_options(context: Any) -> dict[str, str]:
    """Map the parameters that stand on the command line to their flags, as `damp` to `--damp`."""
    given = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if (
            parameter.param_type_name == "option"
            and source is not None
            and source.name in ("COMMANDLINE", "ENVIRONMENT")
        ):
            off = context.params.get(parameter.name) is False and parameter.secondary_opts
            given[parameter.name] = (parameter.secondary_opts if off else parameter.opts)[0]
    return given


def refuse_idle(given: Mapping[str, str], idle: Mapping[str, str]) -> None:
    """Raises AfpqError naming the first option that was given and is idle, and why."""
    for name, flag in given.items():
        if name in idle:
            raise AfpqError(f"{flag} has no effect here: {idle[name]}")


def idle_options(use: Use) -> dict[str, str]:
    """Map each parameter of `afpq quantize` that has no effect in such a run to the reason, and what to do."""
    idle = _of_other_methods(use.method)
    learns = f"method {use.method} learns from no text; leave it out, or choose {_calibrated_methods()}"
    if not use.draws:
        idle |= {"samples": learns, "seed": learns}
        if not use.measured:
            idle["seq_len"] = learns
    if not use.calibrated:
        idle["all_experts"] = learns
    if not use.draws:
        if not use.measure:
            idle |= dict.fromkeys(("text", "dataset"), f"{learns}, or measure on it (without --no-card-measure)")
        elif use.eval_text:
            idle |= dict.fromkeys(("text", "dataset"), f"{learns}; the result is measured on --eval-text")
    if not (use.text or use.eval_text) and use.measure:
        idle["card_measure"] = "there is no text to measure on; give --eval-text FILE"
    if not use.budget:
        idle["sensitivities"] = "it is for a budget of bits; give --bits-per-weight too"
    elif not use.same_ends:
        reason = "--bits-per-weight chooses from --candidates, and no end has the scheme of the blocks"
        idle |= dict.fromkeys(("format", "group_size", "sym", "scale_dtype"), reason)
    if not (use.draws or use.measured) and use.device not in ("auto", "cpu"):
        idle["device"] = f"method {use.method} without a text runs on the CPU"
    return idle


def idle_in_eval(text: bool, tasks: bool) -> dict[str, str]:
    """The same for `afpq eval`: with a text to measure on, with benchmarks (`tasks`), or both."""
    idle: dict[str, str] = {}
    if not tasks:
        names = ("include_path", "limit", "num_fewshot", "batch_size", "allow_code_execution")
        idle |= dict.fromkeys(names, "it is for --tasks, which is not given")
    elif not text:
        idle |= dict.fromkeys(
            ("seq_len", "max_tokens"), "there is no text to measure on: --text FILE or --dataset NAME"
        )
    return idle


def _of_other_methods(method: str) -> dict[str, str]:
    """Map the options of solvers that this method does not have to the reason."""
    own = {part.name for part in fields(METHODS[method].options)}
    idle = {}
    for kind in METHODS.values():
        for part in fields(kind.options):
            if part.name not in own:
                users = [name for name, each in METHODS.items() if part.name in {p.name for p in fields(each.options)}]
                idle[part.name] = f"method {method} does not have it; it is for --method {_or(users)}"
    return idle


def _calibrated_methods() -> str:
    return f"--method {_or([name for name, method in METHODS.items() if method.calibrated])}"


def _or(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
