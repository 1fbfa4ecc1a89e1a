# SPDX-License-Identifier: MIT
"""Which matrices of a model its quantized checkpoint holds, and whether packed.

A checkpoint may be loaded into another class than the one it was saved from: a classifier on a language model, one
tower of two, a language model on a bare backbone. So not the config but the files decide: a matrix is packed exactly if
its packed tensors are there. One that is not there at all is new, a float module for Transformers to initialize and to
report; but what the saved model had, its blocks above all, must be there.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from afpq.checkpoint.locate import TensorLookup
from afpq.errors import AfpqError
from afpq.model.blocks import find_blocks
from afpq.model.embedding_and_head import EmbeddingAndHead
from afpq.numerics.packing import layout
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe


class SavedModules:
    """The matrices of a model that its quantized checkpoint holds; `model` has none replaced by packed ones yet."""

    def __init__(self, model: PreTrainedModel, located: TensorLookup) -> None:
        self.located, self.kind = located, type(model).__name__
        self.saved_from = tuple(getattr(model.config, "architectures", None) or ())
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = set(tied)
        stacks = {f"{block.name.rpartition('.')[0]}." for block in find_blocks(model)}
        self.stacks = tuple(stack for stack in stacks if located.holds_any(stack))  # of blocks that were saved

    def is_packed(self, name: str, scheme: Scheme) -> bool:
        """Whether the checkpoint holds the matrix called `name` packed, which `scheme` of the config would be.

        False for one that it holds as a float weight, and for a new one. Raises AfpqError if it holds neither though
        the saved model had the matrix: because it is of the same class, or its blocks have other tensors there.
        """
        if any(self.located.find(f"{name}.{part}") is not None for part in layout(scheme, 1, 1)):
            return True
        if self.located.find(f"{name}.weight") is not None or f"{name}.weight" in self.tied:
            return False
        if self.kind in self.saved_from or name.startswith(self.stacks):
            raise AfpqError(f"tensor {name}.qweight is not in the checkpoint; its files or its config are incomplete")
        return False

    def settle_ends(self, recipe: Recipe, ends: EmbeddingAndHead) -> Recipe:
        """Return the recipe with schemes for those ends that are packed; a tied head has the embedding's.

        Raises AfpqError as `is_packed` does.
        """
        table, head = recipe.embedding, recipe.lm_head
        if table is not None and (ends.embedding is None or not self.is_packed(ends.embedding, table)):
            table = None
        if ends.tied:
            head = table
        elif head is not None and (ends.head is None or not self.is_packed(ends.head, head)):
            head = None
        return replace(recipe, embedding=table, lm_head=head)

    def check_nothing_packed(self, names: list[str]) -> None:
        """Check that a model without a packed module has its linears `names` as floats. Raises AfpqError if not."""
        for name in names:
            if self.located.find(f"{name}.weight") is None:
                made_from = f"; it was saved from {', '.join(self.saved_from)}" if self.saved_from else ""
                raise AfpqError(
                    f"the checkpoint holds no quantized layer under a name of {self.kind}, and no tensor {name}.weight"
                    f"{made_from}: load it as a class with the names that it was saved with"
                )
