# SPDX-License-Identifier: MIT
"""Scales found by squared error instead of by the group's extremes (`scale_search="mse"`).

Shrinking a scale clips the largest weight and rounds all others finer. The two sides of a group are independent
one-dimensional problems, so each is scanned over the same ratios of its absmax scale, and the winner is refined by
alternating codes and the closed-form best scale for those codes (least squares). All of it is done a second time for
the group's mirrored codebook, written as negative scales, and the better one kept.

Every group is sorted once and its running sums kept. All weights between two neighbouring boundaries take the same
level v, so the error of a candidate, sum h (w - v)^2, follows from the running sums of h and h w at the boundaries:
sum h w^2 (the same for all candidates, left out) + sum over levels of v^2 sum h - 2 v sum h w.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import extremes, parts, side_midpoints
from afpq.numerics.scales import fit_scales, round_to_storage, scales_from_range
from afpq.numerics.scheme import SCALE_SEARCHES as SCALE_SEARCHES

# Of the absmax scale: 0.44 .. 1.105, and a few far below for groups whose largest weights hardly matter.
RATIOS = (0.15, 0.25, 0.35, *(0.44 + 0.035 * step for step in range(20)))
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
REFINEMENTS = 2


def find_scales(
    weight: Tensor, scheme: FittedScheme, scale_search: str, importance: Tensor | None = None
) -> GroupScales:
    """Find scales [rows, groups] for float32 [rows, in] by `fit_scales` ("absmax") or `search_scales` ("mse").

    `importance`, float [in] >= 0, weighs the columns of the search. Raises AfpqError as these, and for another search.
    """
    if scale_search == "absmax":
        return fit_scales(weight, scheme)
    if scale_search == "mse":
        return search_scales(weight, scheme, importance)
    raise AfpqError(f"scale search {scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")


def search_scales(weight: Tensor, scheme: FittedScheme, importance: Tensor | None = None) -> GroupScales:
    """Search scales [rows, groups] of least sum of importance * (w - w_hat)^2 for float32 [rows, in].

    `importance`, float [in] >= 0, is usually the activations' second moment; None weighs all columns equally. The
    error exceeds that of `fit_scales` by float32 rounding at most. Raises AfpqError as `fit_scales` does.
    """
    low, high = extremes(weight, scheme.scheme)
    found = []
    for columns, groups, length in parts(weight.shape[-1], scheme.span(weight.shape[-1])):
        x = weight[:, columns].unflatten(-1, (-1, length))
        h = None if importance is None else importance[columns].view(-1, length)
        found.append(_search_both(x, h, scheme, low[:, groups, None], high[:, groups, None]))
    return GroupScales.cat(found, 1)[..., 0]


def _search_both(x: Tensor, importance: Tensor | None, scheme: FittedScheme, low: Tensor, high: Tensor) -> GroupScales:
    """Search scales of groups x [rows, groups, length], [rows, groups, 1], of the codebook or, if better, mirrored."""
    plain = _Search(x, importance, scheme)
    scales = plain.run(low, high)
    codebook = scheme.format.values
    if scheme.zero_point or all(a == -b for a, b in zip(codebook, reversed(codebook))):
        return scales  # mirroring would change nothing
    mirrored = _Search(-x, importance, scheme)
    other = mirrored.run(high, low, saturate=True)  # its longer side may need a larger scale than can be stored
    better = mirrored.total() < plain.total()
    pos = torch.where(better, -other.pos, scales.pos)
    return replace(scales, pos=pos, neg=torch.where(better, -other.neg, scales.neg) if scheme.two_scales else pos)


class _Search:
    """A search over groups x [rows, groups, length]; scales here are [rows, groups, 1]."""

    def __init__(self, x: Tensor, importance: Tensor | None, scheme: FittedScheme) -> None:
        self.scheme = scheme
        self.sorted, order = x.sort(-1)
        weight = torch.ones_like(x) if importance is None else importance.expand(x.shape).gather(-1, order)
        # float64: the sums at two boundaries are subtracted, and a group may be a row of thousands
        self.h = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
        self.hw = torch.nn.functional.pad((weight.double() * self.sorted).cumsum(-1), (1, 0))

        # The codebook's levels and the boundaries between them; a boundary at 0 divides the two sides.
        codebook = scheme.format.values
        below, above = [v for v in codebook if v < 0], [v for v in codebook if v > 0]
        if scheme.format.has_zero:
            below, above = [*below, 0.0], [0.0, *above]
        self.split = len(below)
        self.levels = torch.tensor(below + above, device=x.device)
        self.boundaries = torch.tensor(sorted((*side_midpoints(scheme.format), 0.0)), device=x.device)
        self.codes = torch.tensor(codebook, device=x.device)

    def run(self, low: Tensor, high: Tensor, saturate: bool = False) -> GroupScales:
        self.best = scales_from_range(low, high, self.scheme, saturate)
        self.error = self._errors(self.best)
        for ratio in RATIOS:
            self._consider(scales_from_range(low * ratio, high * ratio, self.scheme, saturate=True))
        for _ in range(REFINEMENTS):
            self._consider(self._least_squares())
        return self.best

    def total(self) -> Tensor:
        """Return the errors of the best, of whole groups, up to the same sum h w^2."""
        return self.error[0] + self.error[1] if self.scheme.two_scales else self.error[0]

    def _units(self, scales: GroupScales) -> tuple[Tensor, Tensor]:
        """Return levels and boundaries before scaling, shifted by each group's zero point if it has one."""
        if scales.zero is None:
            return self.levels, self.boundaries
        shift = self.codes[scales.zero.int()]
        return self.levels - shift, self.boundaries - shift

    def _moments(self, scales: GroupScales) -> tuple[Tensor, Tensor]:
        """Return sum h and sum h w of the weights that take each level: [rows, groups, levels]."""
        _, boundaries = self._units(scales)
        # The sign of the unshifted boundary is that of its side; with a zero point both scales are one.
        scale = torch.where(self.boundaries < 0, scales.neg.float(), scales.pos.float())
        boundaries = boundaries * scale
        if not self.scheme.format.has_zero:
            boundaries[..., self.split - 1] = -SMALLEST_NORMAL  # a weight of 0 belongs to the positive side
        index = torch.searchsorted(self.sorted, boundaries.contiguous(), right=True)

        def between(sums: Tensor) -> Tensor:
            at = sums.gather(-1, index)
            return torch.cat([at, sums[..., -1:]], -1).diff(dim=-1, prepend=torch.zeros_like(at[..., :1]))

        return between(self.h), between(self.hw)

    def _sides(self, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the levels of the positive and of the negative side; over all levels if there is one scale."""
        if not self.scheme.two_scales:
            total = terms.sum(-1, keepdim=True)
            return total, total
        return terms[..., self.split :].sum(-1, keepdim=True), terms[..., : self.split].sum(-1, keepdim=True)

    def _scaled_levels(self, scales: GroupScales) -> Tensor:
        units, _ = self._units(scales)
        return units * torch.where(self.levels < 0, scales.neg.float(), scales.pos.float())

    def _errors(self, scales: GroupScales) -> tuple[Tensor, Tensor]:
        h, hw = self._moments(scales)
        level = self._scaled_levels(scales)
        return self._sides(level * (level * h - 2 * hw))

    def _consider(self, new: GroupScales) -> None:
        """Keep the better of `new` and the best so far, each side on its own."""
        best, error, new_error = self.best, self.error, self._errors(new)
        better = [n < e for n, e in zip(new_error, error)]
        pos = torch.where(better[0], new.pos, best.pos)
        neg = torch.where(better[1], new.neg, best.neg) if self.scheme.two_scales else pos
        zero = None
        if best.zero is not None and new.zero is not None:
            zero = torch.where(better[0], new.zero, best.zero)
        self.best = replace(best, pos=pos, neg=neg, zero=zero)
        self.error = torch.minimum(new_error[0], error[0]), torch.minimum(new_error[1], error[1])

    def _least_squares(self) -> GroupScales:
        """Return the scales of least error for the codes of the best ones: sum(h u w) / sum(h u u)."""
        best, scheme = self.best, self.scheme
        h, hw = self._moments(best)
        unit, _ = self._units(best)
        above, below = self._sides(unit * hw), self._sides(unit * unit * h)

        def scale(side: int, old: Tensor) -> Tensor:
            new = (above[side] / below[side]).float()
            return round_to_storage(
                torch.where(torch.isfinite(new) & (new > 0), new, old.float()), scheme, saturate=True
            )

        pos = scale(0, best.pos)
        return replace(best, pos=pos, neg=scale(1, best.neg) if scheme.two_scales else pos)
