# SPDX-License-Identifier: MIT
"""Put packed modules in the place of a model's embedding and output head."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from afpq.model.blocks import replace_module
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import EmbeddingAndHead, untie
from afpq.model.linear import AfpqLinear
from afpq.numerics.scheme import Scheme

PackEnd = Callable[[str, nn.Module, Scheme], AfpqEmbedding | AfpqLinear]  # (name, float module, its scheme)


def replace_ends(model: nn.Module, ends: EmbeddingAndHead, schemes: Mapping[str, Scheme], pack: PackEnd) -> None:
    """Replace the ends that have a scheme by what `pack` returns; a tied head then reads the embedding's table.

    `schemes` are those of `EmbeddingAndHead.schemes`: the embedding comes first.
    """
    for name, scheme in schemes.items():
        module = model.get_submodule(name)
        new: nn.Module
        if ends.tied and name == ends.head:
            table = model.get_submodule(ends.embedding or "")
            assert isinstance(module, nn.Linear) and isinstance(table, AfpqEmbedding)
            new = AfpqTiedHead(table, module.bias)
        else:
            new = pack(name, module, scheme)
            if isinstance(new, AfpqLinear):
                new.readable = False
        replace_module(model, name, new)
    untie(model, schemes)
