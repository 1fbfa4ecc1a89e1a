# SPDX-License-Identifier: MIT
"""Map a checkpoint's tensor names to the model's: Transformers renames and merges many tensors while it loads them.

Its own conversion table gives the renamings, and from each merge of experts the names that the experts' linears have in
files (`w1`, `w3` and `w2` in Mixtral's, `gate_proj`, `up_proj` and `down_proj` in most others).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from afpq.model.experts import DOWN, GATED, NAMES, PLAIN


@dataclass(frozen=True)
class ExpertMerge:
    """Experts stored one by one that Transformers merges into one parameter.

    `in_files` and `merged` are the ends of the name of the module of experts, in files and in the model, `leaves` the
    names of an expert's linears, `parameter` the merged one.
    """

    in_files: str
    merged: str
    leaves: tuple[str, ...]
    parameter: str

    def in_model(self, name: str) -> str | None:
        """Return the name of an expert's tensor once the experts are linears; None for other tensors."""
        leaves = "|".join(map(re.escape, self.leaves))
        match = re.search(rf"(?<!\w){re.escape(self.in_files)}\.(\d+\.(?:{leaves})\.\w+)$", name)
        return None if match is None else f"{name[: match.start()]}{self.merged}.{match[1]}"


class TensorNames:
    """The conversions of Transformers for a model that only rename tensors, or merge experts."""

    def __init__(self, model: nn.Module) -> None:
        conversions = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.merges = [m for c in conversions if isinstance(c, WeightConverter) and (m := _merge_of(c)) is not None]

    def in_model(self, tensor: str) -> str:
        """Return the model's name, with experts as linears, of a checkpoint's tensor; the prefix may be missing."""
        name: str = rename_source_key(tensor, self.renamings, [])[0]
        return next((found for merge in self.merges if (found := merge.in_model(name)) is not None), name)

    def leaves(self) -> tuple[str, ...]:
        """Return the names of an expert's linears in the model's files: gate, up, down."""
        inputs = next((m.leaves for m in self.merges if m.parameter in (GATED, PLAIN)), NAMES[:2])
        down = next((m.leaves for m in self.merges if m.parameter == DOWN), NAMES[2:])
        return (*(inputs if len(inputs) == 2 else (NAMES[0], *inputs)), *down)


def _merge_of(converter: WeightConverter) -> ExpertMerge | None:
    """Return the merge of a converter that only stacks experts, gate before up; None for any other."""
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or len(converter.target_patterns) != 1:
        return None
    patterns = [pattern.replace("\\.", ".").strip("^.$") for pattern in converter.source_patterns]
    sources = [re.fullmatch(r"([\w.]+)\.\*\.(\w+)\.weight", pattern) for pattern in patterns]
    merged, _, parameter = converter.target_patterns[0].replace("\\.", ".").strip(".").rpartition(".")
    heads = {match[1] for match in sources if match is not None}
    if None in sources or len(heads) != 1 or parameter not in (GATED, PLAIN, DOWN):
        return None
    return ExpertMerge(heads.pop(), merged, tuple(match[2] for match in sources if match is not None), parameter)
