# SPDX-License-Identifier: MIT
"""The Transformers plug-in: quantize while loading, load what was saved. Importing this file registers it.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=AfpqConfig(format="nf4"))
    AutoModelForCausalLM.from_pretrained("a directory written by afpq")
    AutoModelForCausalLM.from_pretrained("the same", quantization_config=AfpqConfig(dequantize=True))

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
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from afpq.blocks import find_linears, replace_module
from afpq.config import QUANT_METHOD, config_from_json, config_to_json, is_kept
from afpq.errors import AfpqError
from afpq.integrations.hub import wrap_upload
from afpq.linear import AfpqLinear
from afpq.packing import layout, to_tensors
from afpq.pipeline import solve
from afpq.scheme import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE, Recipe
from afpq.source import TensorInfo, find_tensor, require_tensor, tensor_headers


class AfpqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize, or how a saved model was: the `quantization_config` of its config.json.

    bits (2, 3, 4, 8) picks the normal-float format of that width unless `format` names one; `sym=False` means a
    scale for each sign (a zero point for integer formats). `modules_to_not_convert` holds names or patterns of
    modules left alone; `dynamic` maps "+:regex" to keys that override, "-:regex" to skip. `dequantize` loads a saved
    model with plain weights; all else then comes from the saved model. Raises AfpqError for values that make no sense.
    """

    dequantize = False  # of the instance only where it is asked for: a wish of the one who loads, never saved

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
        dequantize: bool = False,
        **extra: Any,
    ) -> None:
        ours = ("self", "dequantize", "extra", "__class__")
        keys = {name: value for name, value in locals().items() if name not in ours}
        recipe, kept = config_from_json({**extra, **keys})
        self.__dict__.update(extra)
        self.__dict__.update(config_to_json(recipe, kept))
        self.dynamic = dict(dynamic or {})
        if dequantize:
            self.dequantize = True

    def recipe(self) -> tuple[Recipe, list[str]]:
        """(recipe, modules_to_not_convert)."""
        return config_from_json(self.__dict__)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to `from_pretrained` changes of the saved one."""
        return {"dequantize": True} if self.dequantize else {}


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
        if self.quantization_config.dequantize and not self.pre_quantized:
            raise AfpqError("dequantize=True is for a checkpoint that is quantized already; this one is not")
        recipe, kept = self.quantization_config.recipe()
        if not self.pre_quantized and recipe.method != "rtn":
            raise AfpqError(f"method {recipe.method!r} needs calibration; use afpq.quantize, and load its result")
        self.directory = Path(checkpoint_files[0]).parent if checkpoint_files else None  # for the card to push
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
            module.prepare()
        if self.quantization_config.dequantize:  # Transformers has dropped the config by now; the weights are packed
            return self._dequantize(model, model.dtype)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        parent, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(parent), AfpqLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Plain linears in place of ours, so that the model is an ordinary one in `dtype`, by default the one it has.

        Everything that is in the model's dtype is cast along, as it has to compute with the weights. Raises AfpqError,
        with the model as it was, for a weight too large for `dtype` or one that is offloaded.
        """
        model = self._dequantize(model, dtype or model.dtype)
        self.remove_quantization_config(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.config.__dict__.pop("_is_quantized", None)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, AfpqLinear)]
        for name, layer in layers:
            _check_dequantizable(name, layer, dtype)
        before = model.dtype
        for name, layer in layers:
            replace_module(model, name, _plain_linear(layer, dtype))
        for parameter in model.parameters():
            if parameter.dtype == before:
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
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


def _check_dequantizable(name: str, layer: AfpqLinear, dtype: torch.dtype) -> None:
    if layer.qweight.is_meta:
        raise AfpqError(f"{name}: its weight is offloaded; load the model without offloading to dequantize it")
    if dtype == torch.float16 and not bool(torch.isfinite(layer.dequantize(dtype)).all()):
        raise AfpqError(f"{name}: its weights are too large for float16; dequantize to bfloat16 or float32")


def _plain_linear(layer: AfpqLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    if hasattr(layer, "_hf_hook"):  # accelerate moves inputs to the device of a layer this way
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(linear, layer._hf_hook)
    return linear.train(layer.training)


if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:  # a second registration raises
    register_quantization_config(QUANT_METHOD)(AfpqConfig)
    register_quantizer(QUANT_METHOD)(AfpqHfQuantizer)
    wrap_upload()
    # Methods whose config may be given beside a saved one. There is no hook for it; the first 5.x have no list either
    # and warn that they keep to the saved config.
    if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (AfpqConfig,)
