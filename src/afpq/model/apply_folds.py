# SPDX-License-Identifier: MIT
"""Find the folds that a block has, and fold channel scales into it in place (`awq_folds.py` holds the folds)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError
from afpq.model.awq_folds import FAMILIES, Fold
from afpq.model.blocks import is_linear
from afpq.model.experts import Expert


def folds_of(block: nn.Module) -> tuple[Fold, ...]:
    """Return the folds of a Transformers block or of an expert, in the order their linears run; () if there are none.

    Code from elsewhere (`trust_remote_code`) has none, even if its class has the name of a listed one.
    """
    if isinstance(block, Expert):
        *_, up, down = block.form.names
        return (Fold(up, (down,), down),) if block.form.linear_in_up else ()
    if not type(block).__module__.startswith("transformers.models."):
        return ()
    return tuple(fold for fold in FAMILIES.get(type(block).__name__, ()) if _fits(block, fold))


def _fits(block: nn.Module, fold: Fold) -> bool:
    if any(_attribute(block, path) != wanted for path, wanted in fold.when):
        return False
    linears = [_attribute(block, name) for name in fold.linears]
    previous = _attribute(block, fold.previous)
    weight = _attribute(block, f"{fold.previous}.weight")
    if not isinstance(weight, Tensor) or not all(isinstance(m, nn.Module) and is_linear(m) for m in linears):
        return False
    if isinstance(previous, nn.Linear) and not is_linear(previous):
        return False
    if len({weight.shape[1] for weight in fold_weights(block, fold)}) != 1:
        return False
    rows = producer_rows(block, fold)
    return rows is not None and (fold.layout != "same" or len(rows) == len(weight))


def _attribute(block: nn.Module, path: str) -> object:
    value: object = block
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def fold_weights(block: nn.Module, fold: Fold) -> list[Tensor]:
    """Return the weights [out, in] of the fold's linears, in its order."""
    return [block.get_parameter(f"{name}.weight") for name in fold.linears]


def producer_rows(block: nn.Module, fold: Fold) -> Tensor | None:
    """Return, as int64 [in], the row of `previous` that feeds each column of the linears; None if shapes do not fit.

    A row occurs several times if query heads share a head of v.
    """
    rows = len(block.get_parameter(f"{fold.previous}.weight"))
    columns = fold_weights(block, fold)[0].shape[1]
    if fold.layout == "same":
        return torch.arange(columns)
    if fold.layout == "gate_up":
        return torch.arange(columns, 2 * columns) if rows == 2 * columns else None
    attention = block.get_submodule(fold.previous.rpartition(".")[0])
    names = ("v_head_dim",) if fold.layout == "k_v" else ("head_dim", "head_size", "attention_head_size")
    dim = next((d for name in names if isinstance(d := getattr(attention, name, None), int)), None)
    if dim is None:
        return None
    if fold.layout == "k_v":
        each, rest = divmod(rows * dim, columns)  # rows of a head
        first = torch.arange(1, columns // dim + 1) * each - dim
        fits = not rest and columns % dim == 0 and each > dim
        return (first[:, None] + torch.arange(dim)).flatten() if fits else None
    heads = columns // dim  # of q
    shared = rows // dim if fold.layout == "v" else (rows // dim - heads) // 2  # heads of k and of v
    fused = 0 if fold.layout == "v" else heads + shared
    if shared < 1 or heads % shared or heads * dim != columns or (fused + shared) * dim != rows:
        return None
    reads = torch.arange(heads) // (heads // shared)  # the head of v that each query head reads
    first = (reads + 1) * (heads // shared + 2) - 1 if fold.layout == "heads" else reads + fused
    return (first[:, None] * dim + torch.arange(dim)).flatten()


def shared_mean(block: nn.Module, fold: Fold, x: Tensor) -> Tensor:
    """Average x [in] over the columns that one row of `previous` feeds, which must have one scale. Same shape."""
    rows = _rows(block, fold).to(x.device)
    size = int(rows.max()) + 1
    total = x.new_zeros(size).index_add(0, rows, x)
    return (total / x.new_zeros(size).index_add(0, rows, torch.ones_like(x)))[rows]


@torch.no_grad()
def apply_fold(block: nn.Module, fold: Fold, scales: Tensor, saved_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply the linears' columns by `scales` [in] and divide `previous` by them, in place: the function stays.

    A norm is rounded to the dtype of its file (`saved_dtype`; its own by default), and the linears are multiplied by
    the quotient of its old and new values: Gemma's 1 + weight leaves few digits in bfloat16. Returns these scales s
    (float32 [in]): the linears' inputs are now smaller by them, and their second moment is H / (s s^T). Raises
    AfpqError for scales that are not positive and finite, or that differ between columns that share a row.
    """
    previous = block.get_submodule(fold.previous)
    weight = block.get_parameter(f"{fold.previous}.weight")
    rows, scales = _rows(block, fold).to(weight.device), scales.to(weight.device).double()
    divisor = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
    divisor[rows] = scales
    if not bool((torch.isfinite(scales) & (scales > 0)).all()) or not torch.allclose(divisor[rows], scales, rtol=1e-5):
        raise AfpqError(f"scales of {fold.previous} must be positive, finite, and equal where columns share a row")
    if isinstance(previous, nn.Linear):
        _multiply(weight, 1 / divisor[:, None])
    else:
        divisor = _divide_norm(weight, divisor, float(fold.plus_one), saved_dtype or weight.dtype)
    bias = getattr(previous, "bias", None)
    if isinstance(bias, Tensor):
        _multiply(bias, 1 / divisor)
    for readers in fold_weights(block, fold):
        _multiply(readers, divisor[rows])
    return divisor[rows].float()


def _multiply(weight: Tensor, factor: Tensor) -> None:
    """Multiply in place, by a factor narrowed to float32: float64 would convert the whole weight on the way."""
    weight.mul_(factor.to(torch.promote_types(weight.dtype, torch.float32)))


def _divide_norm(weight: Tensor, divisor: Tensor, offset: float, saved_dtype: torch.dtype) -> Tensor:
    """Divide offset + weight [in] in place; return the divisor of each channel after rounding to `saved_dtype`."""
    old = weight.double() + offset
    new = (old / divisor - offset).to(saved_dtype).double() + offset
    new = torch.where((new != 0) & torch.isfinite(new), new, old)  # rounding must not erase a channel
    weight.copy_(new - offset)
    return torch.where(old == 0, divisor, old / new)


def _rows(block: nn.Module, fold: Fold) -> Tensor:
    rows = producer_rows(block, fold)
    if rows is None:
        raise AfpqError(f"{fold.previous} does not have the shape of a fold {fold.layout!r}")
    return rows
