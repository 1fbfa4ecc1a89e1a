# SPDX-License-Identifier: MIT
"""One weight by the recipe's solver, with what is known of its inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from afpq.algorithms import (
    SingularHessian,
    quantize_gptq,
    quantize_guided,
    quantize_rtn,
    search_clips,
    toward_float_outputs,
)
from afpq.calibration.round_units import LayerLog
from afpq.calibration.stages import Moments
from afpq.checkpoint.plan import Target
from afpq.errors import AfpqError
from afpq.numerics.fitted_scheme import FittedScheme
from afpq.numerics.groups import QuantizedWeight, encode, relative_error
from afpq.numerics.scheme import Scheme
from afpq.recipe import METHODS, Recipe


def solve_layer(
    W: Tensor,
    moments: Moments | None,
    target: Target,
    recipe: Recipe,
    G: Tensor | None = None,
    fitted: FittedScheme | None = None,
) -> tuple[QuantizedWeight, LayerLog]:
    """One weight by the recipe's solver; rounded to nearest, with a note, where its inputs teach nothing.

    G [out, out], the gradients' second moment, is for guided methods: by GPTQ, with a note, where there is none.
    `fitted` is the target's scheme if it is settled already, as for one of a weight's parts.

    Raises AfpqError naming the tensor for NaN or Inf in the weight.
    """
    start = time.perf_counter()
    note = None if moments is not None else "not used on the calibration text; rounded to nearest"
    method = recipe.method if moments is not None else "rtn"
    damp = before = after = None
    if METHODS[recipe.method].guided and moments is not None and not _usable(G):
        method, note, G = "gptq", "no gradients reach it; by GPTQ", None
    with named(target.tensor):
        importance = None if moments is None else _importance(moments)
        scheme = fitted or target.scheme
        nearest = quantize_rtn(W, scheme, recipe.search, importance)
        solved = nearest
        if moments is not None:
            try:
                solved, damp, before, after = _solve_on_moments(W, moments, scheme, recipe, nearest, G)
            except SingularHessian as error:
                method, note = "rtn", f"{error}; rounded to nearest"
    log = LayerLog(
        module=target.module,
        scheme=str(solved.scheme),
        method=method,
        weight_error=relative_error(W, solved),
        bits_per_weight=8 * target.bytes / target.elements,
        seconds=round(time.perf_counter() - start, 4),
        output_error_before=before,
        output_error=after,
        damp=damp,
        tokens=None if moments is None else moments.tokens,
        note=note,
    )
    return solved, log


def _importance(moments: Moments) -> Tensor | None:
    """The inputs' second moments as weights of the columns; None where they are zero or not finite."""
    diagonal = moments.H.diagonal()
    return diagonal if bool(torch.isfinite(diagonal).all()) and bool(diagonal.max() > 0) else None


def _usable(G: Tensor | None) -> bool:
    return G is not None and bool(torch.isfinite(G).all()) and bool(G.diagonal().max() > 0)


def _solve_on_moments(
    W: Tensor,
    moments: Moments,
    scheme: Scheme | FittedScheme,
    recipe: Recipe,
    nearest: QuantizedWeight,
    G: Tensor | None,
) -> tuple[QuantizedWeight, float | None, float, float]:
    """(weight, damping, relative output error of rounding to nearest, and of this), against the outputs aimed at.

    Errors are weighed by G where it is given.
    """
    H, wanted, damp = moments.H, W, None
    if not bool(torch.isfinite(H).all()):
        raise SingularHessian("the layer's inputs are NaN or Inf")
    if METHODS[recipe.method].solver == "gptq":
        if moments.D is not None and recipe.gptq.float_target:
            wanted = toward_float_outputs(W, H, moments.D, recipe.gptq.damp)
        if G is not None:
            solved, damp = quantize_guided(wanted, H, G, scheme, recipe.gptq, recipe.search)
        else:
            solved, damp = quantize_gptq(wanted, H, scheme, recipe.gptq, recipe.search)
    elif recipe.search == "mse":
        scales = search_clips(W, H, nearest.fitted)
        solved = QuantizedWeight(encode(W, scales, nearest.scheme), scales, nearest.scheme)
    else:
        solved = nearest
    total = _loss(wanted, H, G)
    errors = [_loss(weight.dequantize() - wanted, H, G) / total if total else 0.0 for weight in (nearest, solved)]
    return solved, damp, errors[0], errors[1]


def _loss(E: Tensor, H: Tensor, G: Tensor | None) -> float:
    return ((E @ H) * (E if G is None else G @ E)).sum().item()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors raised inside say which block or tensor they are about."""
    try:
        yield
    except SingularHessian:
        raise
    except AfpqError as error:
        raise AfpqError(f"{name}: {error}") from None
