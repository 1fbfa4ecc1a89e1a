# SPDX-License-Identifier: MIT
"""AfpqEmbedding: a packed table that unpacks only the rows looked up. AfpqTiedHead: the output head that shares it.

Models with tied embeddings use one table twice: a token's row on the way in, a product with all rows on the way out.
The embedding stores it; the head keeps a reference and no tensors, so that saving, moving and counting see one table.
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

    `lookup` is the float embedding it replaces, with one row of ones in place of its table, in the dtype of the
    results. So a class of embedding that multiplies its rows by a factor (Gemma's) still gives that factor.
    """

    def __init__(self, lookup: nn.Embedding, scheme: Scheme, device: torch.device | str | None = None) -> None:
        super().__init__(lookup.num_embeddings, lookup.embedding_dim, scheme, device)
        self.num_embeddings, self.embedding_dim = lookup.num_embeddings, lookup.embedding_dim
        self.padding_idx, lookup.padding_idx = lookup.padding_idx, None  # a table of one row has no such row
        ones = torch.ones(1, lookup.embedding_dim, dtype=lookup.weight.dtype, device=device)
        del lookup.weight
        lookup.register_buffer("weight", ones, persistent=False)
        self.lookup = lookup

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, lookup: nn.Embedding) -> AfpqEmbedding:
        """Make the embedding that looks up rows of weight.dequantize(), [num_embeddings, embedding_dim]."""
        table = cls(lookup, weight.scheme, "meta")
        table.fill(weight)
        table.lookup._buffers["weight"] = torch.empty_like(table.lookup.weight, device=weight.codes.device)
        table.settle()
        return table

    def settle(self) -> None:
        """Restore the row of ones, which loading leaves uninitialized; call once all tensors are loaded.

        Raises AfpqError for a class of embedding that does more than scale its rows.
        """
        with torch.no_grad():
            self.lookup.weight.fill_(1)
        if not scales_its_rows(self.lookup):
            raise AfpqError(f"{type(self.lookup).__name__} does more than to scale its rows; cannot be quantized")
        self.prepare()

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """Return the float embedding, with the dequantized table in `dtype`; this module must not be used any more."""
        lookup = self.lookup
        del lookup.weight
        lookup.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        lookup.padding_idx = self.padding_idx
        return lookup

    def forward(self, ids: Tensor) -> Tensor:
        """Look up token ids [...]: the rows [..., embedding_dim], in the dtype of the float embedding."""
        flat = ids.reshape(-1)
        scales, scales_neg, zeros, grid = self._scale_buffers()
        codebook = self.scheme.format
        rows: Tensor = kernels.dequantize(
            self.qweight.index_select(0, flat),
            scales.index_select(0, flat),
            None if scales_neg is None else scales_neg.index_select(0, flat),
            None if zeros is None else pack(codes_at(zeros, codebook.bits, flat), codebook.bits),
            grid,
            codebook.values,
            codebook.bits,
            self.scheme.group_size,
            self.embedding_dim,
            self.lookup.weight.dtype,
        )
        rows = rows.view(*ids.shape, self.embedding_dim)
        return rows if type(self.lookup) is nn.Embedding else rows * self.factor()

    def factor(self) -> Tensor:
        """Return the factor that rows are multiplied by, [1, embedding_dim]."""
        factor: Tensor = self.lookup(torch.zeros(1, dtype=torch.long, device=self.lookup.weight.device))
        return factor

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme}"


class AfpqTiedHead(AfpqLinear):
    """An output head that reads an embedding's table; its only tensor, if any, is a bias."""

    readable = False

    def __init__(self, table: AfpqEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings
        self.rows, self.columns = table.rows, table.columns
        self.bias, self.dtype = bias, table.lookup.weight.dtype
        self.__dict__["table"] = table  # not a submodule: its tensors would be saved a second time

    @property
    def scheme(self) -> Scheme:  # type: ignore[override]
        """The table's scheme, whose codebook may have been learned after this head was made."""
        table: AfpqEmbedding = self.__dict__["table"]
        return table.scheme

    @property
    def qweight(self) -> Tensor:  # type: ignore[override]
        return self.packed()["qweight"]

    def packed(self) -> dict[str, Tensor]:
        table: AfpqEmbedding = self.__dict__["table"]
        return table.packed()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., out_features] as any linear does, on the embedding's device."""
        return super().forward(x.to(self.qweight.device))
