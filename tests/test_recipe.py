# SPDX-License-Identifier: MIT
"""A recipe's options belong to its method; `gptq` is their old name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from afpq import AfpqError, AwqOptions, GptqOptions, Recipe, parse_scheme
from afpq.algorithms.solver_options import SolverOptions

NF4 = parse_scheme("nf4-asym-g64")


def test_options_are_the_methods_defaults_unless_given() -> None:
    assert Recipe(NF4).solver_options == SolverOptions()
    assert Recipe(NF4, "awq").solver_options == AwqOptions()
    assert replace(Recipe(NF4), method="tune").solver_options == GptqOptions()
    given = Recipe(NF4, "gptq", options=GptqOptions(damp=0.1, float_target=False, sequential=False))
    assert (given.traits.damp, given.traits.float_model, given.traits.sequential) == (0.1, False, False)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("rtn", GptqOptions(), "takes no options, got GptqOptions"),
        ("awq", GptqOptions(), "takes AwqOptions, got GptqOptions"),
        ("gptq", AwqOptions(), "takes GptqOptions, got AwqOptions"),
    ],
)
def test_options_of_another_method_are_errors(method: str, options: SolverOptions, words: str) -> None:
    with pytest.raises(AfpqError, match=words):
        Recipe(NF4, method, options=options)


def test_the_old_name_of_options_still_works() -> None:
    old = GptqOptions(sweeps=1, sequential=False)
    for method, options in (("gptq", old), ("awq", AwqOptions(False)), ("rtn", SolverOptions())):
        with pytest.warns(DeprecationWarning, match="options="):
            recipe = Recipe(NF4, method, gptq=old)  # type: ignore[call-arg]
        assert recipe.options == options
        assert replace(recipe, end_pass=1).options == options
    with pytest.warns(DeprecationWarning, match="options="):
        assert Recipe(NF4, "gptq", options=old).gptq == old  # type: ignore[attr-defined]


def test_only_scheme_and_method_have_positions() -> None:
    with pytest.raises(TypeError):
        Recipe(NF4, "gptq", "mse")  # type: ignore[misc]
