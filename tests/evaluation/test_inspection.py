# SPDX-License-Identifier: MIT
"""Settings and recommendations of an inspection, from errors written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from afpq import AfpqError, parse_scheme
from afpq.evaluation.inspection import Inspection, InspectSettings, LayerFigures, gain, mean_error, recommend

SMALL = InspectSettings(bits=(3,), group_size=32)


def figures(two: float, one: float, half: float, integer: float) -> Inspection:
    """A model of one layer with these errors."""
    settings = InspectSettings(bits=(4,))
    names = [str(scheme) for scheme in settings.schemes]
    layer = LayerFigures("m.0.a", "a", (8, 8), 8, 1.2, 0.0, dict(zip(names, (two, one, half, integer))))
    return Inspection(settings, [layer], 1, dict(zip(names, (4.25, 4.125, 4.25, 4.156))), 1.0)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.8, 1.1, 1.0, 1.2), "Take nf4-asym-g128: at 4.250 true bits its error is 20.0 % below that of nf4-sym-g64"),
        ((1.0, 1.1, 0.8, 1.2), "Take nf4-sym-g64: at 4.250 true bits its error is 20.0 % below that of nf4-asym-g128"),
        ((1.0, 1.1, 1.01, 1.2), "within 2 % of each other"),
        (
            (1.0, 1.1, 1.0, 0.9),
            "Take int4-asym-g128: its error is the lowest, and it has 4.156 true bits instead of 4.250",
        ),
    ],
)
def test_recommendations_at_equal_bits(errors: tuple[float, float, float, float], words: str) -> None:
    assert words in recommend(figures(*errors), 4)


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.8, 1.1, 1.0, 1.2), "at 4.271 against 4.250 bits its error is 20.0 % below that of nf4-sym-g64"),
        ((1.0, 1.1, 0.8, 1.2), "at 4.250 against 4.271 bits its error is 20.0 % below that of nf4-asym-g128"),
        ((1.0, 1.1, 1.01, 1.2), "at 4.271 against 4.250 bits two scales and one scale at half the group"),
    ],
)
def test_bits_that_differ_are_stated(errors: tuple[float, float, float, float], words: str) -> None:
    """Rows of 576: five groups of 128, the last of them half, cost more than nine of 64."""
    bits = dict(zip((str(s) for s in InspectSettings(bits=(4,)).schemes), (4.271, 4.135, 4.25, 4.156)))
    found = replace(figures(*errors), bits=bits)
    assert words in recommend(found, 4) and found.bits_compared(4) == "4.271 against 4.250 bits"
    assert figures(*errors).bits_compared(4) is None


def test_a_mean_counts_each_layer_by_its_weights() -> None:
    scheme, other = (parse_scheme(f"nf4-{sym}-g32") for sym in ("asym", "sym"))
    layers = [
        LayerFigures("a", "a", (8, 8), 8, 1.0, 0.0, {str(scheme): 0.1, str(other): 0.2}),
        LayerFigures("b", "b", (8, 24), 8, 1.0, 0.0, {str(scheme): 0.3, str(other): 0.6}),
    ]
    assert mean_error(layers, str(scheme)) == pytest.approx(0.25)
    assert gain(layers, scheme, other) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": (5,)}, "bits 5"), ({"bits": (8,)}, "bits 8"), ({"bits": ()}, "bits"),
        ({"group_size": -1}, "group size -1"), ({"group_size": 33}, "even"), ({"group_size": 0}, "group size 0"),
        ({"rows": 0}, "row"), ({"layers": 0}, "layer"), ({"seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_bad_settings(changes: dict[str, object], words: str) -> None:
    with pytest.raises(AfpqError, match=words):
        replace(SMALL, **changes)  # type: ignore[arg-type]
