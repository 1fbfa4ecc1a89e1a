# SPDX-License-Identifier: MIT
"""The ends of a model in memory: which are packed, what a tied head reads, and that they are tied no more."""

from __future__ import annotations

import pytest
from small_models import llama
from torch import nn

from afpq import AfpqLinear, parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import find_embedding_and_head
from afpq.model.replace_ends import replace_ends
from afpq.numerics.scheme import Scheme

TABLE, HEAD = "model.embed_tokens", "lm_head"
SCHEMES = {TABLE: parse_scheme("int8-sym-g32"), HEAD: parse_scheme("nf4-asym-g32")}


class Packer:
    """A function that packs an end, and the names it was called with."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, module: nn.Module, scheme: Scheme) -> AfpqEmbedding | AfpqLinear:
        self.names.append(name)
        weight = quantize_rtn(module.get_parameter("weight"), scheme)
        if isinstance(module, nn.Embedding):
            return AfpqEmbedding.from_weight(weight, module)
        return AfpqLinear.from_weight(weight, None)


def test_a_tied_head_reads_the_table_that_is_packed_once() -> None:
    model, pack = llama(True), Packer()
    ends = find_embedding_and_head(model)
    assert ends.tied
    replace_ends(model, ends, {TABLE: SCHEMES[TABLE], HEAD: SCHEMES[TABLE]}, pack)
    table, head = model.get_submodule(TABLE), model.get_submodule(HEAD)
    assert pack.names == [TABLE]
    assert isinstance(table, AfpqEmbedding) and isinstance(head, AfpqTiedHead)
    assert head.table is table
    model.tie_weights()  # would give the head a weight, or fail, if the ends were still tied
    assert model.get_submodule(HEAD) is head and model.get_submodule(TABLE) is table


@pytest.mark.parametrize("names", [(TABLE,), (HEAD,), (TABLE, HEAD)], ids="+".join)
def test_only_ends_with_a_scheme_are_packed(names: tuple[str, ...]) -> None:
    model, pack = llama(False), Packer()
    plain = {name: model.get_submodule(name) for name in SCHEMES}
    replace_ends(model, find_embedding_and_head(model), {name: SCHEMES[name] for name in names}, pack)
    assert pack.names == list(names)
    for name, before in plain.items():
        after = model.get_submodule(name)
        assert (after is before) == (name not in names)
        if name in names:
            assert isinstance(after, AfpqLinear | AfpqEmbedding) and after.scheme == SCHEMES[name]
            assert not isinstance(after, AfpqLinear) or not after.readable
