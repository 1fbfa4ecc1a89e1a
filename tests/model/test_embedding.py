# SPDX-License-Identifier: MIT
"""AfpqEmbedding gives the rows its codes say, and AfpqTiedHead multiplies by the same ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from afpq import AfpqError, parse_scheme
from afpq.algorithms import quantize_rtn
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.embedding_and_head import scales_its_rows
from afpq.numerics.packing import codes_at, pack

SCHEMES = [
    "nf4-asym-g64-log8", "nf3-asym-g32", "nf2-sym-g32", "int3-asym-g32", "int4-asym-g-1", "int8-sym-g64",
    "int8-asym-g32", "int2-asym-g32-log8",
]  # fmt: skip


class Scaled(nn.Embedding):
    """As Gemma's: a factor in a buffer that is not saved."""

    def __init__(self, *sizes: int, scale: float = 7.3) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)  # type: ignore[operator, no-any-return]


class Shifted(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


class Moved(nn.Embedding):
    """Looks up other rows, as tables of positions do: in a table of one row there are none."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids + 2) % self.num_embeddings)


class Normed(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Padded(nn.Embedding):
    """Has zeros for a token, whatever its row holds."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (ids != 0)[..., None]


class Positioned(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.arange(1, ids.shape[-1] + 1)[:, None]


class Adapted(nn.Embedding):
    """Needs a parameter of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.more


def patched(*sizes: int) -> nn.Embedding:
    lookup = nn.Embedding(*sizes)
    lookup.forward = lambda ids: nn.functional.embedding(ids, lookup.weight) + 1  # type: ignore[method-assign]
    return lookup


@pytest.mark.parametrize("make", [Shifted, Moved, Normed, Padded, Positioned, Adapted, patched])
def test_an_embedding_that_does_more_than_scale_rows_is_found(make: Callable[..., nn.Embedding]) -> None:
    assert not scales_its_rows(make(20, 8))


def test_an_embedding_that_changes_its_table_is_found() -> None:
    assert not scales_its_rows(nn.Embedding(20, 8, max_norm=1.0))


@pytest.mark.parametrize("make", [nn.Embedding, Scaled, type("Plain", (nn.Embedding,), {})])
def test_an_embedding_that_scales_its_rows_passes(make: Callable[..., nn.Embedding]) -> None:
    lookup = make(200_000, 8)
    before = lookup.weight.clone()
    assert scales_its_rows(lookup) and torch.equal(lookup.weight, before)


def packed(scheme: str, lookup: nn.Embedding) -> AfpqEmbedding:
    return AfpqEmbedding.from_weight(quantize_rtn(lookup.weight.detach(), parse_scheme(scheme)), lookup)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.data())
def test_codes_at_some_places_are_those_packed_there(bits: int, count: int, data: st.DataObject) -> None:
    codes = torch.tensor([data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))] * 2)
    places = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=12)), dtype=torch.long)
    codes = codes.to(torch.uint8)
    assert torch.equal(codes_at(pack(codes, bits), bits, places), codes[:, places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_those_of_the_whole_table(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = packed(scheme, nn.Embedding(37, 96, dtype=dtype))
    ids = torch.tensor([[36, 0, 3, 3], [1, 2, 35, 17]])
    rows = layer(ids)
    assert rows.dtype == dtype and torch.equal(rows, layer.dequantize(dtype)[ids])
    assert layer(torch.tensor(5)).shape == (96,) and layer(ids[:, :0]).shape == (2, 0, 96)


def test_it_has_the_tensors_of_a_linear_and_no_others() -> None:
    layer = packed("int4-asym-g32", nn.Embedding(10, 64, padding_idx=3))
    assert set(layer.state_dict()) == {"qweight", "scales", "zeros"}
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (10, 64, 3)
    assert not list(layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_class_that_scales_its_rows_still_does(dtype: torch.dtype) -> None:
    lookup = Scaled(20, 64)
    lookup.to(dtype)
    lookup.padding_idx = 3
    table = copy.deepcopy(lookup)
    layer = packed("nf4-asym-g64", lookup)
    with torch.no_grad():
        table.weight.copy_(layer.dequantize(dtype))
    ids = torch.arange(20)
    assert torch.equal(layer(ids), table(ids))


def test_a_class_that_does_more_is_refused() -> None:
    with pytest.raises(AfpqError, match="Shifted"):
        packed("nf4-asym-g64", Shifted(20, 64))


def test_the_dtype_follows_a_cast_and_the_table_does_not() -> None:
    layer = packed("nf4-asym-g32", Scaled(20, 64))
    before = copy.deepcopy(layer.packed())
    layer.to(torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    assert all(torch.equal(before[k], v) and before[k].dtype == v.dtype for k, v in layer.packed().items())


@pytest.mark.parametrize("ids", [[-1], [20]], ids=["negative", "too large"])
def test_a_token_outside_of_the_table_is_an_error(ids: list[int]) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        packed("nf4-asym-g32", nn.Embedding(20, 64))(torch.tensor(ids))


@pytest.mark.parametrize("scheme", ["nf4-asym-g64-log8", "int3-asym-g32", "int8-sym-g64"])
def test_a_tied_head_multiplies_by_the_rows_unscaled(scheme: str) -> None:
    layer = packed(scheme, Scaled(20, 64))
    head = AfpqTiedHead(layer, nn.Parameter(torch.arange(20.0)))
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(head(x), x @ layer.dequantize().T + torch.arange(20.0), rtol=1e-5, atol=1e-5)
    assert (head.in_features, head.out_features, head.scheme) == (64, 20, layer.scheme)
    assert torch.equal(head.dequantize(), layer.dequantize())


def test_a_tied_head_adds_nothing_to_save_or_move() -> None:
    model = nn.ModuleDict({"table": packed("nf4-asym-g64", nn.Embedding(20, 64))})
    model["head"] = AfpqTiedHead(model["table"])  # type: ignore[arg-type]
    assert all(name.startswith("table.") for name in model.state_dict())
    twin = copy.deepcopy(model)
    twin["table"]._buffers["qweight"].zero_()  # type: ignore[union-attr]
    assert not torch.equal(model["head"].qweight, twin["head"].qweight)  # type: ignore[arg-type]
    assert twin["head"].qweight is twin["table"].qweight
    twin.to(torch.float64)
    assert twin["head"].packed()["scales_pos"] is twin["table"].packed()["scales_pos"]  # type: ignore[operator]


def test_asking_for_the_float_weight_says_what_to_do() -> None:
    layer = packed("nf4-asym-g64", nn.Embedding(20, 64))
    assert not hasattr(layer, "weight")
    with pytest.raises(AfpqError, match="resize_token_embeddings"):
        _ = layer.weight


def test_it_runs_in_one_graph() -> None:
    layer = packed("int4-asym-g32", Scaled(20, 64))
    both = nn.Sequential(layer, AfpqTiedHead(layer))
    ids = torch.tensor([[1, 2, 19]])
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), both(ids))
