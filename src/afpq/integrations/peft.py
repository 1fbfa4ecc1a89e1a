# SPDX-License-Identifier: MIT
"""LoRA by PEFT on a quantized model. Importing this file registers the layer; everything else is PEFT's own API.

    import afpq.integrations.peft
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model = PeftModel.from_pretrained(model, "adapter")

PEFT has no entry point for foreign layers, but a public table with one class per method; ours is the entry for LoRA and
leaves all other layers to PEFT. It needs `pip install 'afpq[peft]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.versions import require_version

from afpq.errors import AfpqError
from afpq.integrations.lora_experts import wrap_adapter_conversion
from afpq.integrations.lora_merge import (
    MergeTarget,
    check_experts,
    fuse_float_experts,
    list_as_float,
    relative_size,
    requantized,
)
from afpq.model.dequantize import float_module, packed_module
from afpq.model.experts import find_experts
from afpq.model.linear import AfpqLinear

try:
    require_version("peft>=0.19")  # earlier ones pass settings to layers in another way
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraModel, PeftType
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
except ImportError as error:
    reason = str(error).splitlines()[0]
    raise AfpqError(f"LoRA needs PEFT 0.19 or newer: pip install 'afpq[peft]' ({reason})") from None

T = TypeVar("T")

# Variants that need the base weight as a float parameter, to change it or to read it in every step.
VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "velora_config",
    "monteclora_config", "kasa_config",
)  # fmt: skip
INITIALIZATIONS = (True, False, "gaussian", "eva")
MAX_MEAN_LOSS = 0.5  # share of the adapters lost by rounding, above which a warning is given


class AfpqLoraLinear(LoraLinear):  # type: ignore[misc]
    """LoRA around an AfpqLinear: PEFT's own layer, except that merging keeps the packed weight for `unmerge`."""

    base_layer: nn.Module
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False
        self.merge_target = MergeTarget()
        self.merge_error: float | None = None
        self._packed: list[AfpqLinear] = []  # while merged, the layer before: in a list, so that it is no submodule

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def weight(self) -> Tensor:
        """The layer's float weight, whose dtype some models cast their inputs to; PEFT's has that of the codes."""
        layer: Any = self.base_layer
        weight: Tensor = super().weight if isinstance(layer, AfpqLinear) and not layer.readable else layer.weight
        return weight

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only; PEFT refuses other variants."""
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **options: Any) -> Any:
        """Return None (plain LoRA). Raises AfpqError for variants that need a float weight."""
        for name in VARIANTS:
            if getattr(config, name, None):
                raise AfpqError(f"LoraConfig({name}=...) needs float weights, these are quantized; use plain LoRA")
        if config.init_lora_weights not in INITIALIZATIONS:
            raise AfpqError(
                f"LoraConfig(init_lora_weights={config.init_lora_weights!r}) would change the weights, which are "
                "quantized; use True or 'gaussian'"
            )
        return super().resolve_lora_variant(config=config, **options)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (the active ones if None) into the weight, by `merge_target`; `unmerge` undoes it exactly.

        `safe_merge` has no effect: an adapter that `check_mergeable` refuses is never merged.
        """
        new = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not new:
            return
        self.check_mergeable(new)
        packed = self._packed[0] if self._packed else self.base_layer
        assert isinstance(packed, AfpqLinear)
        base, bias, names = packed.dequantize(), packed.bias, [*self.merged_adapters, *new]
        change = torch.zeros_like(base)
        for name in names:
            down, up, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
            change += scaling * (up.weight.float() @ down.weight.float())
            if up.bias is not None and bias is not None:
                bias = bias + scaling * up.bias
        if self.merge_target.requantize:
            rounded = requantized(packed.quantized_weight(), base + change)
            self.merge_error = relative_size(rounded.dequantize() - base - change, change)
            self.base_layer = packed_module(packed, rounded, bias)
        else:
            self.merge_error = None
            merged = (base + change).to(self.merge_target.dtype)
            self.base_layer = float_module(packed, merged, bias).requires_grad_(False)
        self._packed, self.merged_adapters = [packed], names

    def unmerge(self) -> None:
        """Restore the packed layer as it was before `merge`, byte by byte."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer = self.base_layer
        device = (layer.qweight if isinstance(layer, AfpqLinear) else layer.get_parameter("weight")).device
        self.base_layer, self._packed, self.merged_adapters = self._packed[0].to(device), [], []

    def check_mergeable(self, names: list[str]) -> None:
        """Raise AfpqError for adapters that hold NaN or Inf, or a bias if the layer has none."""
        for name in names:
            if name not in self.lora_A:
                continue
            for part in (*self.lora_A[name].parameters(), *self.lora_B[name].parameters()):
                if not bool(torch.isfinite(part).all()):
                    raise AfpqError(f"adapter {name} holds NaN or Inf; nothing was merged")
            if self.lora_bias[name] and self.base_layer.bias is None:
                raise AfpqError(f"adapter {name} has a bias (lora_bias) and its layer none; nothing was merged")


class AfpqLoraModel(LoraModel):  # type: ignore[misc]
    """PEFT's LoraModel that also adapts AfpqLinear; `merge_and_unload` and `merge_adapter` accept `requantize`."""

    _given_targets: tuple[Any, Any] | None = None  # (config, its target_modules), while PEFT converts those of experts

    def inject_adapter(self, model: nn.Module, adapter_name: str, *arguments: Any, **options: Any) -> None:
        """Adapt the model as PEFT does, with the targets as they were given: its experts are linears.

        For a float model PEFT turns the experts' linears into their fused parameter, which a quantized one has not.
        """
        config = self.peft_config[adapter_name]
        if find_experts(model):
            self._given_targets = (config, config.target_modules)
            config.target_modules = set()
        super().inject_adapter(model, adapter_name, *arguments, **options)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Complete the config as PEFT does, with AfpqLinear's layer class; "all-linear" has all of them but a head."""
        if self._given_targets is not None and self._given_targets[0] is peft_config:
            peft_config.target_modules, self._given_targets = self._given_targets[1], None
        adapted = tuple(f"{name}." for name in _named(self.model, BaseTunerLayer))
        quantized = [name for name in _named(self.model, AfpqLinear) if not name.startswith(adapted)]
        _check_modules_to_save(peft_config, quantized)
        if AfpqLinear not in (peft_config._custom_modules or {}):
            peft_config._register_custom_module({AfpqLinear: AfpqLoraLinear})
        config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config = _maybe_include_all_linear_layers(config, self.model)
            head = _output_head(self.model)
            config.target_modules = {
                *config.target_modules,
                *(name for name in quantized if self.model.get_submodule(name) is not head),
            }
        return config

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        requantize: bool = False,
    ) -> nn.Module:
        """Return the base model with the adapters merged; adapted layers become float modules in the model's dtype.

        `requantize` rounds them to their own scheme instead, which loses part of the adapters: `merge_errors` holds the
        share. Everything else as in PEFT. The model's config is updated, so that `save_pretrained` writes what loads.
        Raises AfpqError, with nothing merged, as `AfpqLoraLinear.check_mergeable` and `check_experts` do.
        """
        if not requantize:
            check_experts(self.model, list(_named(self.model, AfpqLoraLinear)))
        with self._merging(adapter_names, requantize):
            model: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return model

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, requantize: bool = False
    ) -> None:
        """Merge as `merge_and_unload` does; `unmerge_adapter` restores the packed weights, byte by byte."""
        with self._merging(adapter_names, requantize):
            super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, *arguments: Any, **options: Any) -> nn.Module:
        adapted = _named(self.model, AfpqLoraLinear)
        model: nn.Module = super()._unload_and_optionally_merge(*arguments, **options)
        list_as_float(model, [name for name in adapted if not isinstance(model.get_submodule(name), AfpqLinear)])
        fuse_float_experts(model)
        return model

    @contextmanager
    def _merging(self, adapter_names: list[str] | None, requantize: bool) -> Iterator[None]:
        """Check all layers before any is merged, set their targets, and collect the errors of requantizing."""
        own = (p.dtype for name, p in self.model.named_parameters() if p.is_floating_point() and "lora_" not in name)
        target = MergeTarget(next(own, torch.float32), requantize)
        layers = _named(self.model, AfpqLoraLinear)
        for layer in layers.values():
            layer.check_mergeable(adapter_names or layer.active_adapters)
        for layer in layers.values():
            merged, changed = layer.merged_adapters, layer.merge_target != target
            layer.merge_target = target
            if merged and changed:  # into another target
                layer.unmerge()
                layer.merge(adapter_names=merged)
        yield
        self.merge_errors = {name: layer.merge_error for name, layer in layers.items() if layer.merge_error is not None}
        mean = sum(self.merge_errors.values()) / max(1, len(self.merge_errors))
        if mean > MAX_MEAN_LOSS:
            warnings.warn(
                f"rounding the merged weights to their own schemes moved them by {mean:.0%} of what the adapters did "
                f"(mean of {len(self.merge_errors)} layers; see merge_errors); without requantize nothing is lost",
                stacklevel=4,
            )


def _named(model: nn.Module, kind: type[T]) -> dict[str, T]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head, which "all-linear" leaves out, as in PEFT."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def _check_modules_to_save(config: Any, quantized: list[str]) -> None:
    """Raise AfpqError for a quantized module in `modules_to_save`: PEFT would silently train nothing of it."""
    for name in quantized:
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        for entry in config.modules_to_save or ():
            if any(place.endswith(entry) for place in above):
                raise AfpqError(
                    f"modules_to_save={entry!r} holds {name}, which is quantized and cannot be trained whole; "
                    "adapt it by target_modules, or leave it out when quantizing"
                )


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = AfpqLoraModel
wrap_adapter_conversion()
