# SPDX-License-Identifier: MIT
"""The two ends of a language model: the token embedding, the head that makes logits, and whether they share a weight.

Modules outside the blocks stay as they are unless the recipe has a scheme for an end (`lm_head`, `embedding`). Tied
ends have one scheme.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError
from afpq.model.blocks import end, is_linear, why_left
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


@dataclass(frozen=True)
class EmbeddingAndHead:
    """Names of the embedding and of the head, None if the model has none that can be quantized.

    `tied`: they share one weight. `sharers`: other modules that read the embedding's weight too.
    """

    embedding: str | None
    head: str | None
    tied: bool
    sharers: tuple[str, ...] = ()

    def schemes(self, recipe: Recipe) -> dict[str, Scheme]:
        """Return module -> scheme for the ends that the recipe quantizes, the embedding first; for a tied pair both."""
        chosen = ((self.embedding, recipe.embedding), (self.head, recipe.lm_head))
        return {name: scheme for name, scheme in chosen if name is not None and scheme is not None}


NO_ENDS = EmbeddingAndHead(None, None, False)


def find_embedding_and_head(model: nn.Module) -> EmbeddingAndHead:
    """Find the ends that a Transformers model declares; any other module has none."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = end(model, "get_input_embeddings"), end(model, "get_output_embeddings")
    table = names.get(id(embedding)) if isinstance(embedding, nn.Embedding) else None
    linear = names.get(id(head)) if isinstance(head, nn.Module) and is_linear(head) else None
    if table is None:
        return EmbeddingAndHead(None, linear, False)
    readers = _readers(model, f"{table}.weight")
    tied = linear is not None and (f"{linear}.weight" in readers or head.weight is embedding.weight)
    others = sorted(name.removesuffix(".weight") for name in readers - {f"{linear}.weight"})
    return EmbeddingAndHead(table, linear, tied, tuple(others))


def _readers(model: nn.Module, weight: str) -> set[str]:
    """Return the other names of a weight, as the model declares them."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(weight, weight)
    return {name for pair in tied.items() if source in pair for name in pair} - {weight}


def saved_ends(model: nn.Module, has_tensor: Callable[[str], bool]) -> EmbeddingAndHead:
    """Find the ends of a model already quantized; `has_tensor` shows whether its checkpoint has a tensor.

    A tied head has none; a head with tensors of its own is not tied any more, whatever the config states.
    """
    ends = find_embedding_and_head(model)
    return replace(
        ends, tied=ends.tied and not any(has_tensor(f"{ends.head}.{part}") for part in ("weight", "qweight"))
    )


def settle_recipe(
    model: nn.Module, recipe: Recipe, stored_apart: Callable[[str, str], bool] = lambda _a, _b: False
) -> tuple[Recipe, EmbeddingAndHead]:
    """Return the recipe, with one scheme for both ends if they are tied, and the ends.

    `stored_apart(a, b)`: whether the checkpoint stores different values under two tied names, which unties them, as in
    Transformers. Raises AfpqError if an end that the recipe names does not exist, is skipped, or cannot be quantized.
    """
    ends = find_embedding_and_head(model)
    if recipe.lm_head is None and recipe.embedding is None:
        return recipe, ends
    kind = type(model).__name__
    if recipe.lm_head is not None and ends.head is None:
        head = end(model, "get_output_embeddings")
        reason = why_left(head) if isinstance(head, nn.Module) else None
        because = "" if reason is None else f" ({reason})"
        raise AfpqError(f"{kind} has no output head that is a plain linear layer{because}; leave out --lm-head")
    if recipe.embedding is not None and ends.embedding is None:
        raise AfpqError(f"{kind} has no embedding of tokens that can be quantized; leave out --embedding")
    if ends.tied and stored_apart(f"{ends.embedding}.weight", f"{ends.head}.weight"):
        ends = replace(ends, tied=False)
    if ends.tied:
        recipe = _tie(recipe, ends)
    for name in ends.schemes(recipe):
        pattern = next((p for p in recipe.skip if re.search(p, name)), None)
        if pattern is not None:
            raise AfpqError(
                f"{name}: to be quantized (--lm-head or --embedding) and to be skipped (--skip {pattern!r})"
            )
    if recipe.embedding is not None and ends.embedding is not None:
        lookup = model.get_submodule(ends.embedding)
        if ends.sharers:
            raise AfpqError(f"{ends.embedding}: its weight also serves {ends.sharers[0]}; such a table stays as it is")
        if isinstance(lookup, nn.Embedding) and not scales_its_rows(lookup):
            raise AfpqError(
                f"{ends.embedding}: {type(lookup).__name__} does more than to scale its rows; not supported"
            )
    return recipe, ends


def _tie(recipe: Recipe, ends: EmbeddingAndHead) -> Recipe:
    head, table = recipe.lm_head, recipe.embedding
    if head is not None and table is not None and head != table:
        raise AfpqError(
            f"{ends.head} and {ends.embedding} are one weight: it cannot be both {head} and {table}; name one scheme"
        )
    return replace(recipe, lm_head=head or table, embedding=head or table)


def untie(model: nn.Module, packed: Collection[str]) -> None:
    """Remove these modules, which have no weights, from those that Transformers ties in loading and `tie_weights()`."""
    for prefix, part in model.named_modules():
        place = f"{prefix}." if prefix else ""
        weights = [f"{name}.weight".removeprefix(place) for name in packed if name.startswith(place)]
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            tied = getattr(part, attribute, None)
            if isinstance(tied, dict) and weights:
                rest = {a: b for a, b in tied.items() if not any(re.match(p, w) for p in (a, b) for w in weights)}
                if rest != tied:
                    setattr(part, attribute, rest)


def retie(model: Any) -> None:
    """Undo `untie`, for a model that has float weights again."""
    for part in model.modules():
        part.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


@torch.no_grad()
def scales_its_rows(lookup: nn.Embedding) -> bool:
    """Check that an embedding returns its table's row times a factor: 1, or the class's own.

    It is called with tables made up for it. True for an embedding whose buffers hold no values yet.
    """
    if lookup.max_norm is not None:
        return False
    if type(lookup).forward is nn.Embedding.forward and "forward" not in vars(lookup):
        return True
    if any(b.is_meta for name, b in lookup.named_buffers() if name != "weight"):
        return True
    device = next((b.device for b in lookup.buffers() if not b.is_meta), torch.device("cpu"))

    def result(table: Tensor, ids: Tensor) -> Tensor:
        trial = copy.copy(lookup)
        trial._parameters, trial.padding_idx = {"weight": nn.Parameter(table, False)}, None
        trial._buffers = {name: buffer for name, buffer in lookup._buffers.items() if name != "weight"}
        found: Tensor = trial(ids)
        return found.float()

    first, width, rows = torch.zeros(1, 1, dtype=torch.long, device=device), lookup.embedding_dim, lookup.num_embeddings
    ids = torch.tensor([[rows - 1, 0, rows // 2, 0, rows - 1]], device=device)
    row, numbers = torch.linspace(-3, 2, width, device=device)[None], torch.arange(1.0, rows + 1, device=device)
    try:
        factor = result(torch.ones(1, width, device=device), first)
        rows_scale = torch.allclose(result(row, first), row * factor, rtol=1e-5)
        found = result(numbers[:, None].expand(rows, width), ids)  # a table of any size, without its memory
        return rows_scale and torch.allclose(found, numbers[ids][..., None] * factor, rtol=1e-5)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError):  # code that needs more than a table
        return False
