# SPDX-License-Identifier: MIT
"""Figures of a comparison: what is drawn, with which marks, and what is left out."""

from __future__ import annotations

from dataclasses import replace

from comparisons import HALF, ORIGINAL, TWO, ZERO, result

from afpq.comparison.cells import Cell, LayerError
from afpq.comparison.charts import MAX_SMALL_CHARTS, colour_of, figures, legend, shape_of
from afpq.comparison.distributions import BINS, Asymmetry

LAYERS = (
    LayerError("model.layers.0.mlp.experts.0.up_proj", 0.1),
    LayerError("model.layers.0.mlp.experts.1.up_proj", 0.3),
    LayerError("model.layers.1.mlp.down_proj", 0.4, 0.4, 0.2),
)
TOOL = result("nf4-b64", "bitsandbytes", 4.5, 0.01)


def test_shapes_are_kinds_of_schemes_and_colours_methods() -> None:
    assert [shape_of(r.cell) for r in (TWO, HALF, ZERO, TOOL)] == ["dot", "ring", "square", "triangle"]
    methods = ("rtn", "gptq", "awq", "awq+gptq", "bitsandbytes")
    assert len({colour_of(Cell("nf3-asym-g128", method)) for method in methods}) == len(methods)


def test_the_legend_names_what_is_in_use() -> None:
    assert [text for _, text in legend([ORIGINAL, TWO, ZERO])] == ["rtn", "two scales", "scale and zero point"]
    assert [text for _, text in legend([ORIGINAL, HALF, TOOL])] == ["rtn", "another tool", "one scale"]


def test_there_is_a_figure_for_all_that_was_measured() -> None:
    groups = [Asymmetry(64, (1,) * BINS, 0.25), Asymmetry(-1, (0,) * BINS, 0.0)]
    full = replace(TWO, layers=LAYERS, codes=(1, 2, 3, 4, 4, 3, 2, 1))
    assert [f.title for f in figures([ORIGINAL], [])] == []
    assert [f.small for f in figures([ORIGINAL, HALF], [])] == [False, False]
    kl, perplexity, layers, asymmetry, codes = figures([ORIGINAL, full, HALF], groups)
    assert "nf3-asym-g128 rtn: 3.250 bits, KL x 1000 31.00" in kl.panels[0].svg
    assert ">float<" in perplexity.panels[0].svg
    assert [panel.heading for panel in layers.panels] == ["nf3-asym-g128 rtn"]
    assert [panel.note for panel in asymmetry.panels] == ["25 % lopsided", "0 % lopsided"]
    assert asymmetry.panels[1].heading == "groups of a whole row"
    assert codes.panels[0].note == "2.85 of 3 bits" and "code 0, value -1: 5.0 %" in codes.panels[0].svg


def test_errors_of_experts_are_drawn_as_their_mean() -> None:
    panel = figures([ORIGINAL, replace(TWO, layers=LAYERS)], [])[2].panels[0]
    assert "block 0 up_proj: 2.00e-01" in panel.svg
    assert "block 1 down_proj: 2.00e-01" in panel.svg
    assert panel.note == "outputs, mean error 200.00e-3"


def test_cells_without_a_small_chart_are_counted_in_the_caption() -> None:
    many = [replace(TWO, cell=Cell(f"nf3-asym-g{32 * (i + 1)}", "rtn"), layers=LAYERS) for i in range(20)]
    figure = figures([ORIGINAL, *many], [])[2]
    assert len(figure.panels) == MAX_SMALL_CHARTS and f"Shown are {MAX_SMALL_CHARTS} cells" in figure.caption
    assert "Shown" not in figures([ORIGINAL, *many[:MAX_SMALL_CHARTS]], [])[2].caption
