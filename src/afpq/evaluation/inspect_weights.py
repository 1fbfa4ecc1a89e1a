# SPDX-License-Identifier: MIT
"""What two scales would gain on a model, before any quantization: how lopsided its groups are, and the errors.

Each weight is rounded to nearest in four schemes: two scales a group, one scale, one scale at half the group (which
costs the same bits as two scales at the whole), and integers with zero points. Only some rows of each layer are read
and rounded, drawn with a seed: groups lie inside of rows, so rows are a fair sample of them. These are errors of
weights, not of outputs: they tell which scheme suits the weights, not how good the model will be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan, Target
from afpq.checkpoint.reader import Checkpoint, open_checkpoint
from afpq.errors import AfpqError
from afpq.model.skeleton import build_skeleton
from afpq.numerics.formats import FORMATS
from afpq.numerics.groups import extremes, relative_error
from afpq.numerics.packing import layout, spec_bytes
from afpq.numerics.scheme import Scheme
from afpq.progress import Progress
from afpq.recipe import Recipe

SAMPLE = 2**17  # weights of a layer that are read unless told otherwise: enough for 1 % where groups are 128
SAME = 0.02  # errors closer than this share of each other are called equal


@dataclass(frozen=True)
class Rivals:
    """The four schemes compared at one number of bits. `two` and `half` cost the same bits."""

    two: Scheme
    one: Scheme
    half: Scheme
    integer: Scheme

    @property
    def all(self) -> tuple[Scheme, Scheme, Scheme, Scheme]:
        return self.two, self.one, self.half, self.integer


@dataclass(frozen=True)
class InspectSettings:
    """`layers` linears (None: all) and `rows` rows of each (None: as many as hold 2^17 weights) are drawn with `seed`.

    Raises AfpqError for bits without a normal-float format, or a group that cannot be halved.
    """

    bits: tuple[int, ...] = (4, 3)
    group_size: int = 128
    layers: int | None = None
    rows: int | None = None
    seed: int = 0
    scale_search: str = "absmax"

    def __post_init__(self) -> None:
        if not self.bits or any(f"nf{bits}" not in FORMATS for bits in self.bits):
            raise AfpqError(f"bits {', '.join(map(str, self.bits)) or 'none'}; possible: 2, 3, 4")
        if self.group_size < 2 or self.group_size % 2:
            raise AfpqError(f"group size {self.group_size}: half of it is compared too; give an even number")
        if any(count is not None and count < 1 for count in (self.rows, self.layers)):
            raise AfpqError("at least one layer and one row of it are needed")
        if not 0 <= self.seed < 2**62:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to 2^62 - 1")

    def rivals(self, bits: int) -> Rivals:
        """The four schemes that are compared at this width."""
        nf, integer, size = FORMATS[f"nf{bits}"], FORMATS[f"int{bits}"], self.group_size
        return Rivals(Scheme(nf, size), Scheme(nf, size, True), Scheme(nf, size // 2, True), Scheme(integer, size))

    @property
    def schemes(self) -> list[Scheme]:
        return [scheme for bits in self.bits for scheme in self.rivals(bits).all]


@dataclass(frozen=True)
class LayerFigures:
    """One linear, from `rows` of its rows. `kind` is its name in a block, the same in every block.

    `asymmetry`: median over the groups with both signs of the longer side over the shorter one, each in units of its
    side of the code book. `one_sided`: share of groups with one sign only. `errors` by scheme: sum (w - w_hat)^2 /
    sum w^2.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rows: int
    asymmetry: float
    one_sided: float
    errors: dict[str, float]

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Inspection:
    """Figures of all layers looked at; `bits` are the true bits of each scheme over the whole model.

    `ends` are the shares of the checkpoint's weights that the embedding and the head hold, a tied pair by the
    embedding's name: what `--lm-head` and `--embedding` are about.
    """

    settings: InspectSettings
    layers: list[LayerFigures]
    layers_in_model: int
    bits: dict[str, float]
    seconds: float
    ends: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Weights of the layers looked at, of which `rows` rows each were rounded."""
        return sum(layer.elements for layer in self.layers)

    @property
    def seconds_per_billion(self) -> float:
        return self.seconds / self.parameters * 1e9

    def kinds(self) -> dict[str, list[LayerFigures]]:
        """The layers by kind, such as `mlp.up_proj`, in the order they first appear."""
        found: dict[str, list[LayerFigures]] = {}
        for layer in self.layers:
            found.setdefault(layer.kind, []).append(layer)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.settings),
            "parameters": self.parameters,
            "layers_in_model": self.layers_in_model,
            "seconds": self.seconds,
            "seconds_per_billion": self.seconds_per_billion,
            "ends": self.ends,
            "schemes": {
                name: {"bits": bits, "error": mean_error(self.layers, name)} for name, bits in self.bits.items()
            },
            "recommendations": {str(bits): recommend(self, bits) for bits in self.settings.bits},
            "layers": [asdict(layer) for layer in self.layers],
        }


def mean_error(layers: Sequence[LayerFigures], scheme: str) -> float:
    """Mean of the layers' relative errors, each counting by its weights."""
    return weighted([(layer.errors[scheme], layer.elements) for layer in layers])


def weighted(pairs: Sequence[tuple[float, int]]) -> float:
    """Mean of values by their weights."""
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def gain(layers: Sequence[LayerFigures], scheme: Scheme, other: Scheme) -> float:
    """Share of the other scheme's error that this scheme saves; negative where it adds to it."""
    error = mean_error(layers, str(other))
    return 1 - mean_error(layers, str(scheme)) / error if error else 0.0


def inspect_model(
    model: str | Path,
    settings: InspectSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Look at a checkpoint (a directory or hub id) that is not quantized yet; holds one layer's rows at a time.

    Raises AfpqError for bad input, and for NaN, Inf or weights too large for their scales in the rows it reads.
    """
    settings, start = settings or InspectSettings(), time.perf_counter()
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    plan = make_plan(checkpoint, skeleton, Recipe(settings.schemes[0], scale_search=settings.scale_search))
    targets = _drawn(plan.targets, settings)
    blocks = {target.module: unit.name for unit in plan.units for target in unit.targets}
    layers = []
    with _one_thread():
        for index, target in enumerate(targets):
            kind = _kind(target.module.removeprefix(f"{blocks[target.module]}."))
            layers.append(_look_at(checkpoint, target, kind, settings, settings.seed + index))
            if progress is not None:
                progress(target.module, index + 1, len(targets))
    bits = {str(scheme): _true_bits(plan.targets, scheme) for scheme in settings.schemes}
    return Inspection(settings, layers, len(plan.targets), bits, round(time.perf_counter() - start, 3), _shares(plan))


def _shares(plan: Plan) -> dict[str, float]:
    infos = plan.checkpoint.tensors
    total = sum(info.elements for info in infos.values())
    modules = [plan.ends.embedding, None if plan.ends.tied else plan.ends.head]
    names = {module: plan.names.get(f"{module}.weight") for module in modules if module is not None}
    return {module: infos[found.tensor].elements / total for module, found in names.items() if found is not None}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Samples are small: more threads gain little, and on a busy machine wait for each other ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _drawn(targets: list[Target], settings: InspectSettings) -> list[Target]:
    count = len(targets) if settings.layers is None else min(settings.layers, len(targets))
    return [targets[index] for index in _sample(len(targets), count, settings.seed)]


def _sample(total: int, count: int, seed: int) -> list[int]:
    """`count` of the numbers below `total`, in order."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def _kind(name: str) -> str:
    """`mlp.experts.3.up_proj` -> mlp.experts.*.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _true_bits(targets: Sequence[Target], scheme: Scheme) -> float:
    packed = sum(spec_bytes(spec) for t in targets for spec in layout(scheme, *t.shape).values())
    return 8 * packed / sum(t.elements for t in targets)


def _look_at(checkpoint: Checkpoint, target: Target, kind: str, settings: InspectSettings, seed: int) -> LayerFigures:
    count = settings.rows or -(-SAMPLE // target.shape[1])
    rows = _sample(target.shape[0], min(count, target.shape[0]), seed)
    weight = checkpoint.read_rows(target.source, rows).float()
    try:
        asymmetry, one_sided = lopsidedness(weight, settings.schemes[0])
        errors = {}
        for scheme in settings.schemes:
            errors[str(scheme)] = relative_error(weight, quantize_rtn(weight, scheme, settings.scale_search))
    except AfpqError as error:
        raise AfpqError(f"{target.tensor}: {error}") from None
    return LayerFigures(target.module, kind, target.shape, len(rows), asymmetry, one_sided, errors)


def lopsidedness(weight: Tensor, scheme: Scheme) -> tuple[float, float]:
    """float32 [rows, in] -> (median over two-sided groups of longer / shorter side, share of one-sided groups).

    Sides are measured in the code book's reach on that side. Groups of zeros only count as neither; where no group has
    two sides the median is 1.
    """
    low, high = extremes(weight, scheme)
    book = scheme.format.values
    low, high = low / -book[0], high / book[-1]
    longer, shorter = torch.maximum(low, high), torch.minimum(low, high)
    both = longer[shorter > 0] / shorter[shorter > 0]
    filled = int((longer > 0).sum())
    one_sided = (filled - both.numel()) / filled if filled else 0.0
    return (float(both.median()) if both.numel() else 1.0), one_sided


def recommend(inspection: Inspection, bits: int) -> str:
    """One sentence: which scheme to take at these bits, by the weights alone."""
    rivals = inspection.settings.rivals(bits)
    two, _, half, integer = (mean_error(inspection.layers, str(scheme)) for scheme in rivals.all)
    cost = f"{inspection.bits[str(rivals.two)]:.3f}"
    if integer < min(two, half):
        cheaper = inspection.bits[str(rivals.integer)]
        return f"Take {rivals.integer}: its error is the lowest, and it has {cheaper:.3f} true bits instead of {cost}."
    if abs(two - half) <= SAME * max(two, half):
        return (
            f"{rivals.two} or {rivals.half}: at {cost} true bits two scales and one scale at half the group are within "
            f"{100 * SAME:.0f} % of each other ({two:.5f}, {half:.5f}), so the weights do not tell which is better."
        )
    best, other, share = (
        (rivals.two, rivals.half, 1 - two / half) if two < half else (rivals.half, rivals.two, 1 - half / two)
    )
    return f"Take {best}: at {cost} true bits its error is {100 * share:.1f} % below that of {other}."
