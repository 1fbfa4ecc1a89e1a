# SPDX-License-Identifier: MIT
"""FittedScheme: a scheme settled for one weight, which is what scales and codes are computed by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from afpq.errors import AfpqError
from afpq.numerics.formats import Format
from afpq.numerics.scale_storage import ScaleGrid, ScaleStorage
from afpq.numerics.scheme import Scheme


@dataclass(frozen=True)
class FittedScheme:
    """The scheme of one weight: its codebook is settled, and its grid fitted if its scales are stored on one.

    `scales.fit_grid` and `algorithms.fit_scheme` make one from a weight. Raises AfpqError for a scheme whose format is
    still to be learned, and unless `grid` is given exactly if the storage of the scales needs one.
    """

    scheme: Scheme
    grid: ScaleGrid | None = None

    def __post_init__(self) -> None:
        if self.scheme.format.learned:
            raise AfpqError(f"{self.scheme}: the codebook is not learned yet; fit_scheme does it")
        if self.storage.needs_grid != (self.grid is not None):
            raise AfpqError(f"{self.scheme}: {'needs a' if self.grid is None else 'takes no'} grid of scales")

    @property
    def format(self) -> Format:
        """The codebook."""
        return self.scheme.format

    @property
    def storage(self) -> ScaleStorage:
        """How the scales are stored."""
        return self.scheme.storage

    @property
    def two_scales(self) -> bool:
        """Whether each sign of a group has a scale of its own."""
        return self.scheme.two_scales

    @property
    def zero_point(self) -> bool:
        """Whether a group has a zero point next to its scale."""
        return self.scheme.zero_point

    def groups(self, in_features: int) -> int:
        """Count the groups of a row, as `Scheme.groups` does."""
        return self.scheme.groups(in_features)

    def span(self, in_features: int) -> int:
        """Count the weights in a full group, as `Scheme.span` does."""
        return self.scheme.span(in_features)

    def with_format(self, format: Format) -> FittedScheme:
        """Return the same scheme, grid included, with another codebook."""
        return replace(self, scheme=replace(self.scheme, format=format))

    def with_group_size(self, group_size: int) -> FittedScheme:
        """Return the same scheme, grid included, with groups of another size."""
        return replace(self, scheme=replace(self.scheme, group_size=group_size))
