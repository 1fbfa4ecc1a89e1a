# SPDX-License-Identifier: MIT
"""`afpq inspect`: what two scales would gain on a model, before it is quantized."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from afpq.commands.options import JsonOption, ModelArgument, ThreadsOption, TrustOption, command
from afpq.commands.output import check_json_place, progress_bar, quiet_transformers, results, save_json, use_threads
from afpq.errors import AfpqError, counted

if TYPE_CHECKING:
    from afpq.evaluation.inspection import Inspection, LayerFigures

MAX_NAMED_LAYERS = 3  # those that gain most
CAVEAT = (
    "These are errors of the weights, rounded to nearest; the model's outputs may rank schemes otherwise, and "
    "calibrated methods (gptq, awq) more so. To know: afpq quantize, then afpq eval --reference."
)


@command("inspect")
def inspect_command(
    model: ModelArgument,
    group_size: Annotated[int, typer.Option(help="Weights that share scales; half of it is compared too.")] = 128,
    bits: Annotated[list[int] | None, typer.Option(help="2, 3 or 4; may be repeated. [default: 4 3]")] = None,
    layers: Annotated[str, typer.Option(help="all, or how many linears to draw.")] = "all",
    rows: Annotated[int | None, typer.Option(help="Rows read of each linear. [default: 131,072 weights]")] = None,
    seed: Annotated[int, typer.Option(help="Which linears and rows are drawn.")] = 0,
    scale_search: Annotated[str, typer.Option(help="absmax (the paper's) or mse (10 times slower).")] = "absmax",
    all: Annotated[bool, typer.Option("--all", help="A line for each layer, not for each kind of layer.")] = False,
    threads: ThreadsOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """How asymmetric a model's weights are, and what two scales would gain: seconds, from a sample of rows."""
    from afpq.evaluation.inspect_weights import inspect_model
    from afpq.evaluation.inspection import InspectSettings

    check_json_place(json)
    use_threads(threads)
    settings = InspectSettings(tuple(bits or (4, 3)), group_size, _count(layers), rows, seed, scale_search)
    with quiet_transformers(), progress_bar("layers") as advance:
        found = inspect_model(model, settings, trust_remote_code, advance)
    read = sum(layer.rows * layer.shape[1] for layer in found.layers)
    results.print(
        f"{model}: {len(found.layers)} of {counted(found.layers_in_model, 'linear')}, {found.parameters:,} weights; "
        f"{100 * read / found.parameters:.0f} % of them read, in rows drawn with seed {seed}"
    )
    lines = _by_name(found) if all else found.kinds()
    _print_asymmetry(found, lines)
    for each in settings.bits:
        _print_errors(found, each, lines)
    _print_wrapped(CAVEAT)
    rate = f", {found.seconds_per_billion:.1f} s per billion weights" if found.parameters > 1e8 else ""
    if found.ends:
        results.print("outside the blocks, in shares of the model (--lm-head, --embedding):")
        for name, share in found.ends.items():
            results.print(f"  {name} {100 * share:.1f} %")
    results.print(f"{found.seconds:.1f} s{rate}")
    save_json(json, {"model": model, **found.to_json()})


def _count(layers: str) -> int | None:
    if layers == "all":
        return None
    if not layers.isdecimal():
        raise AfpqError(f"layers {layers!r}: give all, or a number")
    return int(layers)


def _by_name(found: Inspection) -> dict[str, list[LayerFigures]]:
    """Return each layer for itself, without the beginning that all names have in common."""
    paths = [layer.name.split(".") for layer in found.layers]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and len(paths) > 1:
        common += 1
    return {".".join(path[common:]): [layer] for path, layer in zip(paths, found.layers)}


def _print_asymmetry(found: Inspection, lines: dict[str, list[LayerFigures]]) -> None:
    from afpq.evaluation.inspection import weighted

    title = f"Groups of {found.settings.group_size}: the longer side over the shorter"
    table = _table(title, "layer", "linears", "rows read", "median", "one-sided groups")
    for name, layers in {**lines, "all": found.layers}.items():
        ratio = weighted([(layer.asymmetry, layer.elements) for layer in layers])
        one_sided = weighted([(layer.one_sided, layer.elements) for layer in layers])
        read = sum(layer.rows for layer in layers)
        table.add_row(name, str(len(layers)), f"{read:,}", f"{ratio:.3f}", f"{100 * one_sided:.2f} %")
    results.print(table)


def _print_errors(found: Inspection, bits: int, lines: dict[str, list[LayerFigures]]) -> None:
    from afpq.evaluation.inspection import gain, mean_error, recommend

    rivals = found.settings.rivals(bits)
    names = [str(scheme) for scheme in rivals.all]
    heads = [name.replace("-g", "\ng") for name in names]
    against = found.bits_compared(bits)
    equal = "equal bits" if against is None else against.replace(" against ", "\nagainst ")
    table = _table(f"{bits} bits: relative squared error x 1000", "layer", *heads, f"gain at\n{equal}")
    table.add_row("true bits", *(f"{found.bits[name]:.3f}" for name in names), end_section=True)
    for name, layers in {**lines, "all": found.layers}.items():
        errors = (f"{1000 * mean_error(layers, scheme):.2f}" for scheme in names)
        table.add_row(name, *errors, _percent(gain(layers, rivals.two, rivals.half)), end_section=name == "all")
    saved = (_percent(gain(found.layers, rivals.two, other)) for other in rivals.all[1:])
    table.add_row(f"saved by {names[0].split('-g')[0]}", "", *saved)
    results.print(table)
    gains = {layer.name: gain([layer], rivals.two, rivals.half) for layer in found.layers}
    most = [name for name in sorted(gains, key=lambda name: -gains[name])[:MAX_NAMED_LAYERS] if gains[name] > 0]
    named = ", ".join(f"{name} {_percent(gains[name])}" for name in most) or "none"
    _print_wrapped(f"Layers that gain most at {against or 'equal bits'}: {named}.")
    _print_wrapped(recommend(found, bits))
    results.print()


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _print_wrapped(text: str) -> None:
    """Print sentences, broken between words."""
    results.print(fill(text, 80, break_long_words=False, break_on_hyphens=False))


def _table(title: str, *heads: str) -> Table:
    table = Table(*heads, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table
