# SPDX-License-Identifier: MIT
"""Which layers of a saved checkpoint are quantized, how, and in which tensors. Reads headers only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from afpq.config import QUANT_METHOD, config_from_json, is_kept
from afpq.errors import AfpqError
from afpq.packing import layout, spec_bytes
from afpq.scheme import Scheme
from afpq.skeleton import build_skeleton
from afpq.source import Checkpoint, require_tensor


@dataclass(frozen=True)
class StoredLayer:
    """A quantized linear: the module's name, its scheme, [out, in], and its tensors in the checkpoint by part."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    tensors: dict[str, str]

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """True bits of one weight: codes, scales and zero points."""
        return 8 * sum(map(spec_bytes, layout(self.scheme, *self.shape).values())) / self.elements


def stored_layers(checkpoint: Checkpoint, trust_remote_code: bool = False) -> list[StoredLayer]:
    """The quantized linears of a checkpoint, in the model's order: those its config does not say were kept.

    Raises AfpqError for a checkpoint that is not quantized or by another tool, and for a tensor that is missing or
    has another dtype or shape than the config says.
    """
    keys = checkpoint.config.get("quantization_config")
    if not keys:
        raise AfpqError(f"{checkpoint.directory}: not quantized; its config.json has no quantization_config")
    if isinstance(keys, dict) and keys.get("quant_method") != QUANT_METHOD:
        raise AfpqError(f"{checkpoint.directory}: quantized by {keys.get('quant_method')!r}, not by {QUANT_METHOD}")
    recipe, kept = config_from_json(keys)
    model = build_skeleton(checkpoint.directory, trust_remote_code)
    base = model.base_model_prefix
    layers = []
    for name, module in model.named_modules():
        scheme = recipe.scheme_for(name)
        if not isinstance(module, nn.Linear) or scheme is None or is_kept(name, kept):
            continue
        shape = (module.out_features, module.in_features)
        tensors = {
            part: require_tensor(checkpoint.tensors, f"{name}.{part}", base, *spec)
            for part, spec in layout(scheme, *shape).items()
        }
        layers.append(StoredLayer(name, scheme, shape, tensors))
    return layers
