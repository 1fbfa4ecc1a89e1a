# SPDX-License-Identifier: MIT
"""The plan of a run, made before any weight is read: each tensor's scheme, and the tensors of the output.

It is made from headers alone and contains the name, dtype and shape of every output tensor, so the writer can lay the
files out beforehand, and sizes are available without a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from afpq.checkpoint.reader import Checkpoint
from afpq.errors import AfpqError
from afpq.model.coverage import in_block, reasons_text, share_quantized
from afpq.model.embedding_and_head import NO_ENDS, EmbeddingAndHead
from afpq.model.tensor_part import TensorPart
from afpq.numerics.formats import repeated_codebook_bytes
from afpq.numerics.packing import Spec, layout, packed_bytes, spec_bytes
from afpq.numerics.scheme import Scheme
from afpq.numerics.size import Size
from afpq.recipe import Recipe, exactly

OUTSIDE = "outside the blocks"
HEAD = "the output head"  # its own unit if it is quantized; the last, since its inputs are


@dataclass(frozen=True)
class Target:
    """A linear to quantize: the module's name, the place of its weight, its scheme and shape [out, in].

    `prefix` begins the names of its output tensors. `expert`: whether only some tokens reach it.
    """

    module: str
    source: TensorPart
    scheme: Scheme
    shape: tuple[int, int]
    prefix: str
    expert: bool = False

    @property
    def tensor(self) -> str:
        """The weight's name as in the output; also the checkpoint's, unless one tensor there holds all experts."""
        return f"{self.prefix}weight"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of all its output tensors, and of a codebook of its own."""
        return packed_bytes(self.scheme, *self.shape)

    @property
    def size(self) -> Size:
        return Size(self.bytes, self.elements)


@dataclass(frozen=True)
class KeptPart:
    """A part of a tensor that is kept under its own name, such as an expert's bias; `name` is the model's."""

    name: str
    source: TensorPart
    output: str
    spec: Spec


@dataclass(frozen=True)
class PlanUnit:
    """Tensors handled together: a block, everything outside the blocks, or the head.

    `replaced` maps a tensor of the checkpoint to its replacements; tensors not in it are kept as they are.
    """

    name: str
    tensors: tuple[str, ...]
    replaced: dict[str, tuple[Target | KeptPart, ...]]

    @property
    def targets(self) -> list[Target]:
        return [part for parts in self.replaced.values() for part in parts if isinstance(part, Target)]

    @property
    def pieces(self) -> list[KeptPart]:
        return [part for parts in self.replaced.values() for part in parts if isinstance(part, KeptPart)]

    @property
    def in_blocks(self) -> bool:
        return self.name not in (OUTSIDE, HEAD)


@dataclass(frozen=True)
class Plan:
    """The effect of a recipe on a checkpoint; the recipe has one scheme for a tied head and embedding."""

    checkpoint: Checkpoint
    recipe: Recipe
    units: tuple[PlanUnit, ...]
    kept: tuple[str, ...]  # names of the linears left as they are
    names: dict[str, TensorPart]  # name of a tensor in the model -> its place in the checkpoint
    ends: EmbeddingAndHead = NO_ENDS
    unused: tuple[str, ...] = ()  # the checkpoint's tensors that the architecture does not have
    wrapper: str = ""  # what a wrapper of the model put into the names of the files' tensors
    reasons: Mapping[str, str] = field(default_factory=dict)  # the blocks' linears that cannot be quantized -> why

    @property
    def targets(self) -> list[Target]:
        return [target for unit in self.units for target in unit.targets]

    @property
    def block_targets(self) -> list[Target]:
        """The targets inside the blocks."""
        return [target for unit in self.units if unit.in_blocks for target in unit.targets]

    @property
    def end_targets(self) -> list[Target]:
        """The embedding and the head if they are quantized; one target if they are tied."""
        return [target for unit in self.units if not unit.in_blocks for target in unit.targets]

    def end_words(self, target: Target) -> str:
        """Return an end's name, and the other's if they are tied."""
        return f"{target.module} (and {self.ends.head}, tied to it)" if self.ends.tied else target.module

    def outputs(self) -> dict[str, Spec]:
        """Return name -> (dtype, shape) of every tensor of the output, in order."""
        return {name: spec for unit in self.units for name, spec in self.unit_outputs(unit).items()}

    def unit_outputs(self, unit: PlanUnit) -> dict[str, Spec]:
        """Return the same for one unit."""
        tensors: dict[str, Spec] = {}
        for name in unit.tensors:
            if name not in unit.replaced:
                info = self.checkpoint.tensors[name]
                tensors[name] = (info.dtype, info.shape)
            for part in unit.replaced.get(name, ()):
                if isinstance(part, KeptPart):
                    tensors[part.output] = part.spec
                else:
                    specs = layout(part.scheme, *part.shape)
                    tensors |= {part.prefix + leaf: spec for leaf, spec in specs.items()}
        return tensors

    @property
    def output_bytes(self) -> int:
        return sum(map(spec_bytes, self.outputs().values()))

    @property
    def input_bytes(self) -> int:
        return sum(info.stored_bytes for info in self.checkpoint.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits of a quantized weight of the blocks, or of the ends if no block has one; 0 for none at all."""
        targets = self.block_targets or self.targets
        if not targets:
            return 0.0
        packed = sum(t.bytes for t in targets) - repeated_codebook_bytes(t.scheme.format for t in targets)
        return Size(packed, sum(t.elements for t in targets)).bits

    @property
    def file_bits_per_weight(self) -> float:
        """Bits of everything that is saved per weight of the original."""
        formats = [target.scheme.format for target in self.targets]
        books = sum(format.codebook_bytes for format in formats) - repeated_codebook_bytes(formats)
        elements = sum(info.elements for info in self.checkpoint.tensors.values())
        return Size(self.output_bytes + books, elements).bits

    def with_schemes(self, schemes: Mapping[str, Scheme]) -> Plan:
        """Return the plan with these schemes, by module, in place of its own; tensors stay as planned."""

        def changed(part: Target | KeptPart) -> Target | KeptPart:
            return replace(part, scheme=schemes.get(part.module, part.scheme)) if isinstance(part, Target) else part

        units = tuple(
            replace(unit, replaced={name: tuple(map(changed, parts)) for name, parts in unit.replaced.items()})
            for unit in self.units
        )
        return replace(self, units=units, recipe=settled_recipe(self.recipe, self.ends, schemes))

    def require_targets(self, user: str) -> None:
        """Raise AfpqError if nothing can be quantized; `user` is what needs a weight that is, in words."""
        if not self.targets:
            raise AfpqError(
                f"{self.checkpoint.directory}: {user} needs a linear that can be quantized, and there is none: "
                f"{reasons_text(self.reasons)}"
            )

    @property
    def coverage(self) -> float:
        """Share of the blocks' weights (tensors of two and more dimensions) that is quantized."""
        return share_quantized(sum(target.elements for target in self.block_targets), self.left)

    @property
    def left(self) -> dict[str, int]:
        """The blocks' weights that stay as they are: name of the output's tensor -> number of weights."""
        parts = {target.prefix + part for target in self.targets for part in layout(target.scheme, *target.shape)}
        return {
            name: torch.Size(shape).numel()
            for unit in self.units
            for name, (_, shape) in self.unit_outputs(unit).items()
            if len(shape) > 1 and in_block(name) and name not in parts
        }


def settled_recipe(recipe: Recipe, ends: EmbeddingAndHead, schemes: Mapping[str, Scheme]) -> Recipe:
    """Return the recipe with these modules' schemes: linears by name, before all patterns, and the ends."""
    table = schemes.get(ends.embedding or "", recipe.embedding)
    head = table if ends.tied else schemes.get(ends.head or "", recipe.lm_head)
    inside = tuple((exactly(n), scheme) for n, scheme in schemes.items() if n not in (ends.embedding, ends.head))
    return replace(recipe, overrides=(*inside, *recipe.overrides), lm_head=head, embedding=table)


def loaded_bytes(plan: Plan) -> int:
    """Return the bytes of the loaded result on a CPU: packed weights as they are, the rest in float32."""
    packed = sum(target.bytes for target in plan.targets)
    infos = plan.checkpoint.tensors
    replaced = {tensor for unit in plan.units for tensor in unit.replaced}
    return packed + sum(max(4 * info.elements, info.bytes) for name, info in infos.items() if name not in replaced)


def original_bytes(plan: Plan) -> int:
    """Return the bytes of the loaded original on a CPU: all of it in float32."""
    return sum(max(4 * info.elements, info.bytes) for info in plan.checkpoint.tensors.values())


def vocabulary(plan: Plan) -> int:
    """Return an upper bound of the vocabulary's size: the most rows of any matrix."""
    return max((info.shape[0] for info in plan.checkpoint.tensors.values() if len(info.shape) == 2), default=0)
