# SPDX-License-Identifier: MIT
"""GPTQ on both sides of a weight: its errors are weighed by the gradients at its outputs too, not by inputs alone.

To second order an error E = Q - W of a layer costs the model's predictions a KL of 1/2 tr(G E H E^T) a token. H is the
mean of x x^T over the layer's inputs x, G that of g g^T over the gradients g at its outputs (Fisher's information;
inputs and gradients are taken for independent). GPTQ's loss is that with G = 1: every output alike, and none able to
make up for another's error. With U the upper Cholesky factor of the damped inverse of G, rows are rounded in PARTS,
those of the largest gradients first: each part by GPTQ, and the rest of the rows moves to its optimum given that
part's error. This is the rule of GPTQ's columns; YAQA (2505.22988) follows it row by row, with scales fixed
beforehand. Inside a part rows are taken for independent. One more sweep of descent over all parts ends it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from afpq.algorithms.coordinate_descent import descend
from afpq.algorithms.gptq import Columns, factorize
from afpq.algorithms.scheme_fitting import fit_scheme
from afpq.algorithms.solver_options import GptqOptions
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.group_scales import GroupScales
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.scheme import Scheme

PARTS, HEIGHT = 16, 8  # parts at most, rows in one at least: 4 parts halve the gain, single rows add a tenth to it


def quantize_guided(
    W: Tensor,
    H: Tensor,
    G: Tensor,
    scheme: Scheme | FittedScheme,
    options: GptqOptions | None = None,
    scale_search: str = "mse",
) -> tuple[QuantizedWeight, float]:
    """Quantize W [out, in] float, given H [in, in] and G [out, out] up to factors: (quantized weight, damping of H).

    A plain scheme is fitted to W first (`fit_scheme`). Raises SingularHessian for H or G that cannot be factored, and
    AfpqError for NaN or Inf in W.
    """
    columns = Columns(H, scheme.span(len(H)), options or GptqOptions(), scale_search)
    order = G.diagonal().argsort(descending=True, stable=True)
    rows = factorize(G, columns.options.damp, order)
    W = W.float()
    fitted = fit_scheme(W, scheme, scale_search, columns.importance)
    parts = split_rows(G.diagonal()[order])
    wanted = W[order]
    solved = _quantize_parts(wanted.clone(), columns, rows.U, fitted, parts)
    if columns.options.sweeps:
        solved = _improve_parts(wanted, columns.H, rows.H, solved, parts)
    return _joined(solved, order.argsort()), columns.factor.damp


def split_rows(diagonal: Tensor) -> list[slice]:
    """Divide rows into parts whose gradients have sizes of equal sums, given G's diagonal from large to small.

    So the rows that matter most are among fewer, and each part can make up for the errors of more that came before.
    """
    sums = diagonal.clamp(min=0).sqrt().cumsum(0)
    ends = torch.searchsorted(sums, sums[-1] * torch.arange(1, PARTS, device=sums.device) / PARTS).tolist()
    cuts = [0]
    for end in ends:
        cuts.append(max(cuts[-1] + HEIGHT, end + 1))
    cuts = [*(cut for cut in cuts if cut < len(diagonal)), len(diagonal)]
    return [slice(first, end) for first, end in pairwise(cuts)]


def _quantize_parts(
    W: Tensor, columns: Columns, U: Tensor, scheme: FittedScheme, parts: list[slice]
) -> list[QuantizedWeight]:
    """Quantize the parts of W one after the other; the rows behind a part, in place, make up for its error."""
    solved = []
    for part in parts:
        solved.append(columns.quantize_rows(W[part], scheme))
        error = W[part] - solved[-1].dequantize()
        scaled = torch.linalg.solve_triangular(U[part, part].T, error, upper=False)
        W[part.stop :] -= U[part, part.stop :].T @ scaled
    return solved


def _improve_parts(
    W: Tensor, H: Tensor, G: Tensor, solved: list[QuantizedWeight], parts: list[slice]
) -> list[QuantizedWeight]:
    """Run a sweep of descent over each part, toward its optimum given the others' errors; keep it if it is better."""
    E = torch.cat([weight.dequantize() for weight in solved]) - W
    new = []
    for part, weight in zip(parts, solved):
        others = G[part] @ E - G[part, part] @ E[part]
        target = W[part] - torch.linalg.solve(G[part, part], others)
        found = descend(target, H, weight, 1)
        errors = [w.dequantize() - target for w in (weight, found)]
        before, after = (((G[part, part] @ e @ H) * e).sum() for e in errors)
        new.append(found if bool(after < before) else weight)
        E[part] = new[-1].dequantize() - W[part]
    return new


def _joined(parts: list[QuantizedWeight], places: Tensor) -> QuantizedWeight:
    """Join the parts to one weight, its row i being row places[i] of them."""
    scales = GroupScales.cat([part.scales for part in parts])[places]
    return QuantizedWeight(torch.cat([part.codes for part in parts])[places], scales, parts[0].scheme)
