# SPDX-License-Identifier: MIT
"""The Transformers plug-in: quantize while loading, load what was saved. Importing this file registers it.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=AfpqConfig(format="nf4"))
    AutoModelForCausalLM.from_pretrained("a directory written by afpq")

Stays within the hooks that have been the same since Transformers 5.0. Before any weight is loaded, every tensor the
model expects is looked up in the checkpoint's headers: Transformers itself would leave a missing or misshapen one
as uninitialized memory, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from afpq.blocks import find_linears, replace_module
from afpq.config import QUANT_METHOD, config_from_json, config_to_json, is_kept
from afpq.errors import AfpqError
from afpq.linear import AfpqLinear
from afpq.packing import layout, to_tensors
from afpq.pipeline import solve
from afpq.scheme import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE, Recipe
from afpq.source import TensorInfo, find_tensor, require_tensor, tensor_headers


class AfpqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize, or how a saved model was: the `quantization_config` of its config.json.

    bits (2, 3, 4, 8) picks the normal-float format of that width unless `format` names one; `sym=False` means a
    scale for each sign (a zero point for integer formats). `modules_to_not_convert` holds names or patterns of
    modules left alone; `dynamic` maps "+:regex" to keys that override, "-:regex" to skip. Raises AfpqError for
    values that make no sense.
    """

    def __init__(
        self,
        bits: int | None = None,
        format: str | None = None,
        group_size: int = DEFAULT_GROUP_SIZE,
        sym: bool = False,
        scale_dtype: str = DEFAULT_SCALE_DTYPE,
        method: str = "rtn",
        scale_search: str = "absmax",
        modules_to_not_convert: list[str] | None = None,
        dynamic: dict[str, Any] | None = None,
        **extra: Any,
    ) -> None:
        keys = {name: value for name, value in locals().items() if name not in ("self", "extra", "__class__")}
        recipe, kept = config_from_json({**extra, **keys})
        self.__dict__.update(extra)
        self.__dict__.update(config_to_json(recipe, kept))
        self.dynamic = dict(dynamic or {})

    def recipe(self) -> tuple[Recipe, list[str]]:
        """(recipe, modules_to_not_convert)."""
        return config_from_json(self.__dict__)


class AfpqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linears for AfpqLinear before loading; fills them from the checkpoint, or quantizes what is loaded."""

    requires_calibration = False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, **_: Any) -> bool:
        return True

    def validate_environment(self, *_: Any, **__: Any) -> None:
        """Nothing to check: the plain-torch kernels run everywhere."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.failures: list[AfpqError] = []
        recipe, kept = self.quantization_config.recipe()
        if not self.pre_quantized and recipe.method != "rtn":
            raise AfpqError(f"method {recipe.method!r} needs calibration; use afpq.quantize, and load its result")
        other = next((file for file in checkpoint_files or () if not file.endswith(".safetensors")), None)
        if self.pre_quantized and other is not None:
            raise AfpqError(f"{other}: a quantized model is read from safetensors only")
        headers = {key: info for file in checkpoint_files or () for key, info in _headers_of(file).items()}
        # A saved model lists every linear it kept; the blocks matter only while deciding.
        candidates = _all_linears(model) if self.pre_quantized else find_linears(model)
        converted: set[str] = set()
        for name, linear in candidates:
            saved = _saved_name(name, headers, model.base_model_prefix)
            scheme = recipe.scheme_for(saved)
            if scheme is None or is_kept(saved, kept):
                continue
            layer = AfpqLinear(
                linear.in_features, linear.out_features, scheme, linear.bias is not None, "meta", linear.weight.dtype
            )
            if not self.pre_quantized:
                layer.weight = linear.weight  # a place to load to, replaced by `convert`
            replace_module(model, name, layer)
            converted.add(name)
        if not converted:
            raise AfpqError("no linear layer left to quantize; see modules_to_not_convert and dynamic")
        if self.pre_quantized:
            if checkpoint_files is not None:
                _check_headers(model, headers)
        else:
            rest = {name for name, _ in _all_linears(model)}
            self.quantization_config.modules_to_not_convert = sorted(rest | set(kept))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.failures:
            raise self.failures[0]
        for name, module in model.named_modules():
            if not isinstance(module, AfpqLinear):
                continue
            if "weight" in module._parameters:
                raise AfpqError(
                    f"{name}.weight: not in the checkpoint, or not under this name; list it as not to convert"
                )
            module.check_scales(name)
            module.prepare()
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        parent, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(parent), AfpqLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, AfpqLinear):
                replace_module(model, name, _plain_linear(module, dtype or torch.float32))
        return model


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A loaded weight -> the buffers of its AfpqLinear."""

    def __init__(self, quantizer: AfpqHfQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            prefix = str(name).removesuffix("weight")
            layer = model.get_submodule(prefix.removesuffix("."))
            assert isinstance(layer, AfpqLinear)
            try:
                solved = solve(name, weight, layer.scheme, self.quantizer.quantization_config.recipe()[0])
            except AfpqError as error:
                # Transformers would swallow it; raised once all is loaded, so what stands here meanwhile is never used.
                self.quantizer.failures.append(error)
                solved = solve(name, torch.zeros_like(weight), layer.scheme, Recipe(layer.scheme))
            del layer._parameters["weight"]
            if missing_keys is not None:
                missing_keys.discard(name)
            tensors |= {prefix + part: tensor.contiguous() for part, tensor in to_tensors(solved).items()}
        return tensors


def _all_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _headers_of(file: str) -> dict[str, TensorInfo]:
    """Of a safetensors file; of anything else none, since only those are ours."""
    return tensor_headers(Path(file)) if file.endswith(".safetensors") else {}


def _saved_name(name: str, headers: Mapping[str, TensorInfo], base: str) -> str:
    """The name that patterns of the config mean: with the base model's prefix, also where the head is not loaded."""
    for part in ("weight", "qweight"):
        found = find_tensor(headers, f"{name}.{part}", base)
        if found is not None:
            return found.removesuffix(f".{part}")
    return name


def _check_headers(model: PreTrainedModel, infos: Mapping[str, TensorInfo]) -> None:
    """Every tensor of every AfpqLinear is in the checkpoint, with its dtype and shape; else AfpqError names it."""
    for name, module in model.named_modules():
        if not isinstance(module, AfpqLinear):
            continue
        for part, (dtype, shape) in layout(module.scheme, module.out_features, module.in_features).items():
            require_tensor(infos, f"{name}.{part}", model.base_model_prefix, dtype, shape)
        if module.bias is not None and find_tensor(infos, f"{name}.bias", model.base_model_prefix) is None:
            raise AfpqError(f"tensor {name}.bias is not in the checkpoint; its files or its config are incomplete")


def _plain_linear(layer: AfpqLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second registration raises
    register_quantization_config(QUANT_METHOD)(AfpqConfig)
    register_quantizer(QUANT_METHOD)(AfpqHfQuantizer)
