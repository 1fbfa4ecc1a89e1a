# SPDX-License-Identifier: MIT
"""GPTQ (arXiv 2210.17323) for codebooks with two scales: round column by column, push each error to the right.

Names are the papers': W the weight [out, in], H = X^T X the inputs' second moment, Hinv its damped inverse with upper
Cholesky factor U (Hinv = U^T U). What is done beyond the original:

- scales of a group are fitted when its turn comes, from weights already corrected (the original reads stale ones);
- the order goes by importance, H's diagonal: whole groups first to last and columns inside a group ("group"), so that
  groups stay contiguous and no index is saved; "act" orders all columns and fixes the scales beforehand;
- sweeps of coordinate descent follow, over codes and scales, on the same loss tr((Q-W) H (Q-W)^T)
  (`coordinate_descent.py`);
- H that is not positive definite is damped more until it is, and one that cannot be is an error the caller handles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from afpq.algorithms.coordinate_descent import descend
from afpq.algorithms.scheme_fitting import fit_scheme
from afpq.algorithms.solver_options import GptqOptions
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight, nearest_groups
from afpq.numerics.scale_search import find_scales
from afpq.numerics.scheme import Scheme

BLOCK = 128  # columns corrected one by one before the rest of the matrix is, in one product


@dataclass(frozen=True)
class Factor:
    """Damped H [in, in], its U [in, in] (see above), and the damping it took."""

    H: Tensor
    U: Tensor
    damp: float


class SingularHessian(AfpqError):
    """The error of an H that contains NaN or Inf, or that no damping makes positive definite."""


def factorize(H: Tensor, damp: float, order: Tensor | None = None) -> Factor:
    """Factor H [in, in] with rows and columns in `order`, float32.

    Damping grows tenfold, up to the mean diagonal itself, until Cholesky succeeds. A dead input (zero diagonal)
    counts as independent of all others: its column is rounded to nearest. U comes from one Cholesky and one
    triangular inverse: with P the reversal, PHP = LL^T gives H = RR^T, R = PLP upper, so Hinv = U^T U for U = R^-1.
    Raises SingularHessian.
    """
    diagonal = H.diagonal()
    mean = diagonal.mean()
    if not bool(torch.isfinite(H).all()) or not mean > 0:
        raise SingularHessian("the layer's inputs are zero, NaN or Inf")
    H = H.float().clone() if order is None else H.float()[order][:, order]
    dead = H.diagonal() == 0
    H[dead, dead] = mean
    while damp <= 1:
        damped = H.clone()
        damped.diagonal().add_(damp * mean)
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not bool(failed) and bool(torch.isfinite(L).all()):
            identity = torch.eye(len(H), device=H.device)
            U = torch.linalg.solve_triangular(L.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(U).all()):
                return Factor(damped, U, damp)
        damp *= 10
    raise SingularHessian("the inputs' second moment is singular at any damping")


def quantize_gptq(
    W: Tensor,
    H: Tensor,
    scheme: Scheme | FittedScheme,
    options: GptqOptions | None = None,
    scale_search: str = "mse",
) -> tuple[QuantizedWeight, float]:
    """Quantize W [out, in] float, given H [in, in] = X^T X up to a factor: (quantized weight, damping used).

    A plain scheme is fitted to W first (`fit_scheme`). Raises SingularHessian (the caller may then round to nearest),
    and AfpqError for NaN or Inf in W.
    """
    columns = Columns(H, scheme.span(len(H)), options or GptqOptions(), scale_search)
    W = W.float()
    fitted = fit_scheme(W, scheme, scale_search, columns.importance)
    return columns.quantize_rows(W, fitted), columns.factor.damp


class Columns:
    """The part of GPTQ that depends on a layer's inputs alone, for any rows: order and turns, and the factor of H.

    H is [in, in], `span` the columns of a full group. Raises SingularHessian.
    """

    def __init__(self, H: Tensor, span: int, options: GptqOptions, scale_search: str) -> None:
        self.options, self.search = options, scale_search
        self.importance = H.diagonal().float().clamp(min=0)
        self.span = span
        groups = [slice(first, min(first + self.span, len(H))) for first in range(0, len(H), self.span)]
        self.count = len(groups)
        self.order, self.turns = _order(self.importance, groups, options.order)
        self.factor = factorize(H, options.damp, self.order)
        back = self.order.argsort()
        self.H = self.factor.H[back][:, back]  # damped

    def quantize_rows(self, W: Tensor, scheme: FittedScheme) -> QuantizedWeight:
        """Quantize W float32 [rows, in], with descent if the options have sweeps."""
        run = _Run(W[:, self.order].T.contiguous(), self.factor.U, self.importance[self.order], scheme, self.search)
        if self.options.order == "act":
            run.fix_scales(find_scales(W, scheme, self.search, self.importance))
        for first, columns in self.turns:
            run.round_turn(slice(first, first + len(columns)), columns, self.span)
        weight = run.result(self.order, self.count)
        return descend(W, self.H, weight, self.options.sweeps) if self.options.sweeps else weight


def _order(importance: Tensor, groups: list[slice], order: str) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """Return (permutation of the columns, turns).

    A turn is (first position, columns), a group unless the order is "act".
    """
    if order == "act":
        columns = importance.argsort(descending=True, stable=True)
        return columns, [(first, columns[first : first + BLOCK]) for first in range(0, len(columns), BLOCK)]
    members = [torch.arange(g.start, g.stop, device=importance.device) for g in groups]
    if order == "group":
        means = torch.stack([importance[g].mean() for g in groups])
        members = [members[k] for k in means.argsort(descending=True, stable=True).tolist()]
        members = [m[importance[m].argsort(descending=True, stable=True)] for m in members]
    firsts = [0]
    for m in members:
        firsts.append(firsts[-1] + len(m))
    return torch.cat(members), list(zip(firsts, members))


class _Run:
    """The column loop. Wt is the reordered weight transposed, [in, out], so that a column is contiguous."""

    def __init__(self, Wt: Tensor, U: Tensor, importance: Tensor, scheme: FittedScheme, search: str) -> None:
        self.Wt, self.U, self.importance = Wt, U, importance
        self.scheme, self.search = scheme, search
        self.codes = torch.empty(Wt.shape, dtype=torch.uint8, device=Wt.device)
        self.scales: dict[int, GroupScales] = {}

    def fix_scales(self, scales: GroupScales) -> None:
        """Take scales [rows, groups] instead of fitting each group's when its turn comes."""
        self.scales = {group: scales[:, group] for group in range(scales.pos.shape[1])}

    def round_turn(self, turn: slice, columns: Tensor, span: int) -> None:
        """Round the columns of a turn, whose places in W are `columns`, and correct everything behind it."""
        owners = (columns // span).tolist()
        if owners[0] not in self.scales:  # a group whose turn begins: all corrections have reached it
            one_group = self.scheme.with_group_size(-1)
            found = find_scales(self.Wt[turn].T.contiguous(), one_group, self.search, self.importance[turn])
            self.scales[owners[0]] = found[:, 0]
        for first in range(turn.start, turn.stop, BLOCK):
            self._round_block(first, min(first + BLOCK, turn.stop), owners[first - turn.start :])

    def _round_block(self, first: int, end: int, owners: list[int]) -> None:
        """Round columns [first, end), whose groups are `owners`, and correct everything behind them."""
        block, U = self.Wt[first:end], self.U[first:end, first:end]
        errors = torch.empty_like(block)
        exact = {owner: self.scales[owner].float() for owner in set(owners)}
        steps = U.diagonal().reciprocal().tolist()
        rows = zip(block, errors, U, self.codes[first:end], steps, owners)
        for j, (w, error, u, code, step, owner) in enumerate(rows):
            found, value = nearest_groups(w, exact[owner], self.scheme.format)
            code.copy_(found)
            torch.mul(w - value, step, out=error)
            block[j:].addr_(u[j:], error, alpha=-1)
        self.Wt[end:].addmm_(self.U[first:end, end:].T, errors, alpha=-1)

    def result(self, order: Tensor, groups: int) -> QuantizedWeight:
        """Return the weight with its columns back in place."""
        codes = torch.empty_like(self.codes)
        codes[order] = self.codes
        scales = GroupScales.stack([self.scales[group] for group in range(groups)], 1)
        return QuantizedWeight(codes.T.contiguous(), scales, self.scheme.scheme)
