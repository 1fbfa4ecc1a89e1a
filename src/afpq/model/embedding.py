# SPDX-License-Identifier: MIT
"""AfpqEmbedding: a packed table of which only the rows looked up are unpacked. AfpqTiedHead: its other reader.

Models with tied embeddings have one table for two uses: a token's row on the way in, a product with all rows on the
way out. It is stored once, by the embedding; the head keeps a reference and no tensors, so that saving, moving and
counting see one table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afpq import kernels
from afpq.errors import AfpqError
from afpq.model.embedding_and_head import scales_its_rows
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.numerics.groups import QuantizedWeight
from afpq.numerics.packing import codes_at, pack
from afpq.numerics.scheme import Scheme


class AfpqEmbedding(PackedModule):
    """An embedding whose table is packed; its rows have no gradients.

    `lookup` is the float embedding it replaces, which this takes over: instead of a table it keeps one row of ones,
    in the dtype that results have. So a class of embedding that multiplies its rows by a factor (Gemma's) still says
    by which.
    """

    def __init__(self, lookup: nn.Embedding, scheme: Scheme, device: torch.device | str | None = None) -> None:
        super().__init__(lookup.num_embeddings, lookup.embedding_dim, scheme, device)
        self.num_embeddings, self.embedding_dim = lookup.num_embeddings, lookup.embedding_dim
        self.padding_idx, lookup.padding_idx = lookup.padding_idx, None  # there is no such row in a table of one row
        ones = torch.ones(1, lookup.embedding_dim, dtype=lookup.weight.dtype, device=device)
        del lookup.weight
        lookup.register_buffer("weight", ones, persistent=False)
        self.lookup = lookup

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, lookup: nn.Embedding) -> AfpqEmbedding:
        """The embedding that looks up in weight.dequantize()."""
        table = cls(lookup, weight.scheme, "meta")
        table.fill(weight)
        table.lookup._buffers["weight"] = torch.empty_like(table.lookup.weight, device=weight.codes.device)
        table.settle()
        return table

    def settle(self) -> None:
        """Call once all tensors are there: loading a model leaves whatever the memory held in the row of ones."""
        with torch.no_grad():
            self.lookup.weight.fill_(1)
        if not scales_its_rows(self.lookup):
            raise AfpqError(f"{type(self.lookup).__name__} does more than to scale its rows; cannot be quantized")
        self.prepare()

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """The float embedding again; this one is of no more use."""
        lookup = self.lookup
        del lookup.weight
        lookup.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        lookup.padding_idx = self.padding_idx
        return lookup

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., embedding_dim], in the dtype that the float embedding had."""
        flat = ids.reshape(-1)
        scales, scales_neg, zeros, grid = self._scale_buffers()
        book = self.scheme.format
        rows: Tensor = kernels.dequantize(
            self.qweight.index_select(0, flat),
            scales.index_select(0, flat),
            None if scales_neg is None else scales_neg.index_select(0, flat),
            None if zeros is None else pack(codes_at(zeros, book.bits, flat), book.bits),
            grid,
            book.values,
            book.bits,
            self.scheme.group_size,
            self.embedding_dim,
            self.lookup.weight.dtype,
        )
        rows = rows.view(*ids.shape, self.embedding_dim)
        return rows if type(self.lookup) is nn.Embedding else rows * self.factor()

    def factor(self) -> Tensor:
        """What rows are multiplied by, [1, embedding_dim]."""
        factor: Tensor = self.lookup(torch.zeros(1, dtype=torch.long, device=self.lookup.weight.device))
        return factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"


class AfpqTiedHead(AfpqLinear):
    """An output head that reads an embedding's table; of its own it has at most a bias."""

    readable = False

    def __init__(self, table: AfpqEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.rows, self.columns = table.rows, table.columns
        self.bias, self.dtype = bias, table.lookup.weight.dtype
        self.__dict__["table"] = table  # not as a submodule, whose tensors would be saved a second time

    @property
    def scheme(self) -> Scheme:  # type: ignore[override]
        """The table's, whose book may have been learned after this was made."""
        table: AfpqEmbedding = self.__dict__["table"]
        return table.scheme

    @property
    def qweight(self) -> Tensor:  # type: ignore[override]
        return self.packed()["qweight"]

    def packed(self) -> dict[str, Tensor]:
        table: AfpqEmbedding = self.__dict__["table"]
        return table.packed()

    def forward(self, x: Tensor) -> Tensor:
        """As of any linear; where a model is spread over devices, computed where the embedding is."""
        return super().forward(x.to(self.qweight.device))
