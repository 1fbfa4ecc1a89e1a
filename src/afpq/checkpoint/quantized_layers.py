# SPDX-License-Identifier: MIT
"""List the quantized layers of a saved checkpoint, with their schemes and tensors. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass

from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.quantization_config import QUANT_METHOD, config_from_json
from afpq.checkpoint.reader import Checkpoint
from afpq.checkpoint.saved_modules import SavedModules
from afpq.errors import AfpqError
from afpq.model.blocks import TransposedLinear, is_linear
from afpq.model.embedding_and_head import saved_ends
from afpq.model.experts import find_experts
from afpq.model.skeleton import build_skeleton
from afpq.numerics.packing import layout, packed_bytes
from afpq.numerics.scheme import Scheme
from afpq.numerics.size import Size
from afpq.recipe import is_kept


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized linear: the module's name, its scheme, [out, in], and its tensors in the checkpoint by part.

    `end`: it is the output head or the embedding. `transposed`: an unquantized model stores the weight as [in, out].
    `split`: an unquantized model stores it in one tensor with the layer's other experts.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: dict[str, str]
    end: bool = False
    transposed: bool = False
    split: bool = False

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def size(self) -> Size:
        """Its weights, and the bytes of codes, scales and zero points, and of its codebook if that is written out."""
        return Size(packed_bytes(self.scheme, *self.shape), self.elements)


def quantized_layers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> list[QuantizedLayer]:
    """Return the quantized linears and ends of a checkpoint, in the model's order: those that it holds packed.

    Raises AfpqError for a checkpoint that is not quantized or by another tool, and for a tensor that is missing or has
    another dtype or shape than the config requires.
    """
    keys = checkpoint.config.get("quantization_config")
    if not keys:
        raise AfpqError(f"{checkpoint.directory}: not quantized; its config.json has no quantization_config")
    if isinstance(keys, dict) and keys.get("quant_method") != QUANT_METHOD:
        raise AfpqError(f"{checkpoint.directory}: quantized by {keys.get('quant_method')!r}, not by {QUANT_METHOD}")
    recipe, kept = config_from_json(keys)
    model = build_skeleton(checkpoint.directory, trust_remote_code)
    located = TensorLookup(checkpoint.tensors, model)
    ends = saved_ends(model, lambda name: located.find(name) is not None)
    held = SavedModules(model, located)
    recipe = held.settle_ends(recipe, ends)
    chosen = ends.schemes(recipe)
    # If Transformers merges no experts, files hold them in 3-D tensors.
    split = () if located.names.merges else tuple(f"{name}." for name in find_experts(model))
    layers = []
    for name, module in model.named_modules():
        if ends.tied and name == ends.head and name in chosen:
            continue  # its table is the embedding's
        scheme = chosen.get(name) or (recipe.scheme_for(name) if is_linear(module) else None)
        if scheme is None or is_kept(name, kept) or not held.is_packed(name, scheme):
            continue
        if scheme.format.learned:
            raise AfpqError(f"{checkpoint.directory}: config.json has no code book for {name}; it is incomplete")
        rows, columns = module.get_parameter("weight").shape
        tensors = {
            part: located.require(f"{name}.{part}", *spec) for part, spec in layout(scheme, rows, columns).items()
        }
        turned, in_one = isinstance(module, TransposedLinear), name.startswith(split)
        layers.append(QuantizedLayer(name, scheme, (rows, columns), tensors, name in chosen, turned, in_one))
    return layers
