# SPDX-License-Identifier: MIT
"""The figures of an inspection: which schemes are compared on which sample, their errors, and a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from afpq.errors import AfpqError
from afpq.numerics.formats import INTEGERS, NORMAL_FLOATS
from afpq.numerics.scheme import Scheme

EQUAL_ERRORS = 0.02  # errors closer than this share of each other count as equal


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
    """A sample and the schemes to compare on it.

    `layers` linears (None: all) and `rows` rows of each (None: as many as hold 2^17 weights) are drawn with `seed`.

    Raises AfpqError for bits without a normal-float format, or a group that cannot be halved.
    """

    bits: tuple[int, ...] = (4, 3)
    group_size: int = 128
    layers: int | None = None
    rows: int | None = None
    seed: int = 0
    scale_search: str = "absmax"

    def __post_init__(self) -> None:
        if not self.bits or any(bits not in NORMAL_FLOATS for bits in self.bits):
            possible = ", ".join(map(str, sorted(NORMAL_FLOATS)))
            raise AfpqError(f"bits {', '.join(map(str, self.bits)) or 'none'}; possible: {possible}")
        if self.group_size < 2 or self.group_size % 2:
            raise AfpqError(f"group size {self.group_size}: half of it is compared too; give an even number")
        for name, count in (("layers", self.layers), ("rows", self.rows)):
            if count is not None and count < 1:
                raise AfpqError(f"{name} {count}: at least one is needed")
        if not 0 <= self.seed < 2**62:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to 2^62 - 1")

    def rivals(self, bits: int) -> Rivals:
        """Return the four schemes that are compared at this width."""
        nf, integer, size = NORMAL_FLOATS[bits], INTEGERS[bits], self.group_size
        return Rivals(Scheme(nf, size), Scheme(nf, size, True), Scheme(nf, size // 2, True), Scheme(integer, size))

    @property
    def schemes(self) -> list[Scheme]:
        return [scheme for bits in self.bits for scheme in self.rivals(bits).all]


@dataclass(frozen=True)
class LayerFigures:
    """One linear, from `rows` of its rows. `kind` is its name in a block, the same in every block.

    `asymmetry`: median over the groups with both signs of the longer side over the shorter one, each in units of its
    side of the codebook. `one_sided`: share of groups with one sign only. `errors` by scheme: sum (w - w_hat)^2 /
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
    """The figures of all layers inspected; `bits` are the true bits of each scheme over the whole model.

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

    def bits_compared(self, bits: int) -> str | None:
        """Return the true bits of two scales against one at half the group, if they differ; else None.

        They do if a row's last group is short: 576 weights are 4.5 groups of 128, which costs 5, and 9 of 64.
        """
        rivals = self.settings.rivals(bits)
        two, half = (f"{self.bits[str(scheme)]:.3f}" for scheme in (rivals.two, rivals.half))
        return None if two == half else f"{two} against {half} bits"

    def kinds(self) -> dict[str, list[LayerFigures]]:
        """Return the layers by kind, such as `mlp.up_proj`, in the order they first appear."""
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
    """Return the mean of the layers' relative errors, each counting by its weights."""
    return weighted([(layer.errors[scheme], layer.elements) for layer in layers])


def weighted(pairs: Sequence[tuple[float, int]]) -> float:
    """Return the mean of values by their weights."""
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def gain(layers: Sequence[LayerFigures], scheme: Scheme, other: Scheme) -> float:
    """Return the share of the other scheme's error that this scheme saves; negative if it adds to it."""
    error = mean_error(layers, str(other))
    return 1 - mean_error(layers, str(scheme)) / error if error else 0.0


def recommend(inspection: Inspection, bits: int) -> str:
    """Write one sentence: which scheme to take at these bits, by the weights alone."""
    rivals = inspection.settings.rivals(bits)
    two, _, half, integer = (mean_error(inspection.layers, str(scheme)) for scheme in rivals.all)
    cost = f"{inspection.bits[str(rivals.two)]:.3f}"
    place = inspection.bits_compared(bits) or f"{cost} true bits"
    if integer < min(two, half):
        cheaper = inspection.bits[str(rivals.integer)]
        return f"Take {rivals.integer}: its error is the lowest, and it has {cheaper:.3f} true bits instead of {cost}."
    if abs(two - half) <= EQUAL_ERRORS * max(two, half):
        return (
            f"{rivals.two} or {rivals.half}: at {place} two scales and one scale at half the group are within "
            f"{100 * EQUAL_ERRORS:.0f} % of each other ({two:.5f}, {half:.5f}), "
            "so the weights do not tell which is better."
        )
    if two >= half and inspection.bits_compared(bits) is not None:
        place = f"{inspection.bits[str(rivals.half)]:.3f} against {cost} bits"
    best, other, share = (
        (rivals.two, rivals.half, 1 - two / half) if two < half else (rivals.half, rivals.two, 1 - half / two)
    )
    return f"Take {best}: at {place} its error is {100 * share:.1f} % below that of {other}."
