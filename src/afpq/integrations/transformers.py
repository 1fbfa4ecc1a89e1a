# SPDX-License-Identifier: MIT
"""The Transformers plug-in: quantize while loading, load what was saved. Importing this file registers it.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=AfpqConfig(format="nf4"))
    AutoModelForCausalLM.from_pretrained("a directory written by afpq")

Stays within the hooks that have been the same since Transformers 5.0. Before any weight is loaded, every tensor the
model expects is looked up in the checkpoint's headers: Transformers itself would leave a missing or misshapen one
as uninitialized memory, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from afpq.blocks import conv1d_linears, find_blocks, replace_module
from afpq.config import QUANT_METHOD, config_from_json, config_to_json, is_kept
from afpq.coverage import warn_of_left
from afpq.errors import AfpqError
from afpq.experts import BIAS, AfpqExperts, all_or_none, expert_form, fuse_experts, split_experts
from afpq.groups import QuantizedWeight
from afpq.linear import AfpqLinear
from afpq.names import Located, Names
from afpq.packing import layout, to_tensors
from afpq.pipeline import solve
from afpq.scheme import DEFAULT_GROUP_SIZE, DEFAULT_SCALE_DTYPE, Recipe, Scheme
from afpq.source import TensorInfo, tensor_headers


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
        self.blocks = [block.name for block in find_blocks(model)]
        if not self.pre_quantized and recipe.method != "rtn":
            raise AfpqError(f"method {recipe.method!r} needs calibration; use afpq.quantize, and load its result")
        headers = {key: info for file in checkpoint_files or () for key, info in _headers_of(file).items()}
        located, self.leaves = Located(headers, model), Names(model).leaves()

        def scheme_of(name: str) -> Scheme | None:
            saved = _saved_name(name, located)
            return None if is_kept(saved, kept) else recipe.scheme_for(saved)

        # A saved model lists every linear it kept; the blocks matter only while deciding.
        places = [""] if self.pre_quantized else [f"{name}." for name in self.blocks]
        inside = [(name, m) for name, m in _convertible(model) if any(name.startswith(place) for place in places)]
        for name, module in inside:
            self._convert(model, name, module, scheme_of)
        if not any(isinstance(module, AfpqLinear) for module in model.modules()):
            raise AfpqError("no linear layer left to quantize; see modules_to_not_convert and dynamic")
        _spare_initialization(model)
        if self.pre_quantized:
            if checkpoint_files is not None:
                _check_headers(model, located)
        else:
            rest = {name for name, _ in _convertible(model)}
            self.quantization_config.modules_to_not_convert = sorted(rest | set(kept))

    def _convert(
        self, model: nn.Module, name: str, module: nn.Module, scheme_of: Callable[[str], Scheme | None]
    ) -> None:
        """Put what the module becomes in its place; with a place to load its weights to, where they are not packed."""
        form = expert_form(module, self.leaves)
        if form is None:
            layer = _empty_layer(module, scheme_of(name))
            if layer is not None:
                if not self.pre_quantized:
                    layer.weight = module.weight  # a place to load to, which `_Quantize` empties
                replace_module(model, name, layer)
            return
        schemes = [scheme_of(f"{name}.{linear}") for linear, _ in form.linears()]
        if all_or_none(name, [scheme is not None for scheme in schemes]):
            split = split_experts(module, form)
            for (linear, _), scheme in zip(form.linears(), schemes):
                layer = _empty_layer(split.get_submodule(linear), scheme)
                assert layer is not None
                replace_module(split, linear, layer)
            if not self.pre_quantized:
                for parameter, value in module.named_parameters():
                    split.register_parameter(parameter, value)
            replace_module(model, name, split)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.failures:
            raise self.failures[0]
        for name, module in model.named_modules():
            left = next((p for p in module._parameters if _to_quantize(module, p)), None)
            if left is not None:
                raise AfpqError(
                    f"{name}.{left}: not in the checkpoint, or not under this name; list it as not to convert"
                )
            if isinstance(module, AfpqLinear):
                module.prepare()
        if not self.pre_quantized:
            warn_of_left(model, self.blocks)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        parent, _dot, name = param_name.rpartition(".")
        return _to_quantize(model.get_submodule(parent), name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, AfpqLinear):
                replace_module(model, name, _plain_linear(module, dtype or torch.float32))
        experts = [(name, module) for name, module in model.named_modules() if isinstance(module, AfpqExperts)]
        for name, module in experts:
            replace_module(model, name, fuse_experts(module))
        if experts:
            model._weight_conversions = None  # of a quantized model; None: saved as a float model is
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
            parent, _dot, leaf = str(name).rpartition(".")
            module = model.get_submodule(parent)
            for layer_name, part, kind in _parts(module, parent, leaf, weight):
                layer = model.get_submodule(layer_name)
                assert isinstance(layer, AfpqLinear)
                if kind == "bias":
                    tensors[f"{layer_name}.bias"] = part.contiguous()
                    continue
                packed = to_tensors(self._solve(f"{layer_name}.weight", part, layer.scheme))
                tensors |= {f"{layer_name}.{key}": tensor.contiguous() for key, tensor in packed.items()}
            del module._parameters[leaf]
            if missing_keys is not None:
                missing_keys.discard(name)
        return tensors

    def _solve(self, name: str, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        try:
            return solve(name, weight, scheme, self.quantizer.quantization_config.recipe()[0])
        except AfpqError as error:
            # Transformers would swallow it; raised once all is loaded, so what stands here meanwhile is never used.
            self.quantizer.failures.append(error)
            return solve(name, torch.zeros_like(weight), scheme, Recipe(scheme))


def _parts(module: nn.Module, name: str, leaf: str, weight: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """(linear, its weight or bias, which of them) for all that a loaded parameter holds."""
    if not isinstance(module, AfpqExperts):
        conv1d = isinstance(module, AfpqLinear) and module.conv1d
        yield name, weight.T if conv1d else weight, "weight"
        return
    kind = "bias" if leaf.endswith(BIAS) else "weight"
    for linear, part in module.form.linears():
        if module.form.parameter(part) == leaf.removesuffix(BIAS):
            stored = module.form.stored(part, leaf, int(linear.partition(".")[0]))
            yield f"{name}.{linear}", stored.of(weight), kind


def _to_quantize(module: nn.Module, parameter: str) -> bool:
    """Whether a parameter only waits to be loaded, to be quantized then."""
    return isinstance(module, AfpqExperts) or (isinstance(module, AfpqLinear) and parameter == "weight")


def _convertible(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear, Conv1D and module of fused experts, by name."""
    convs = {name for name, _ in conv1d_linears(model)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or name in convs or expert_form(module) is not None
    ]


def _empty_layer(module: nn.Module, scheme: Scheme | None) -> AfpqLinear | None:
    """An AfpqLinear on the meta device in the shape of a linear or Conv1D; None without a scheme."""
    if scheme is None:
        return None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None) is not None
    conv1d = not isinstance(module, nn.Linear)
    in_features, out_features = weight.shape if conv1d else reversed(weight.shape)
    layer = AfpqLinear(in_features, out_features, scheme, bias, "meta", weight.dtype)
    layer.conv1d = conv1d
    return layer


def _headers_of(file: str) -> dict[str, TensorInfo]:
    """Of a safetensors file; of anything else none, since only those are ours."""
    return tensor_headers(Path(file)) if file.endswith(".safetensors") else {}


def _spare_initialization(model: nn.Module) -> None:
    """Some models fill their linears' weights from the module above (GPT-2's c_proj); ours have none to fill.

    So what holds a quantized linear, and has no tensors of its own, counts as initialized.
    """
    for module in model.modules():
        if any(isinstance(child, AfpqLinear) for child in module.children()):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if not own:
                module._is_hf_initialized = True  # type: ignore[assignment]


def _saved_name(name: str, located: Located) -> str:
    """The name that patterns of the config mean: with the base model's prefix, also where the head is not loaded."""
    for part in ("weight", "qweight"):
        found = located.full(f"{name}.{part}")
        if found is not None:
            return found.removesuffix(f".{part}")
    return name


def _check_headers(model: PreTrainedModel, located: Located) -> None:
    """Every tensor of every AfpqLinear is in the checkpoint, with its dtype and shape; else AfpqError names it."""
    for name, module in model.named_modules():
        if not isinstance(module, AfpqLinear):
            continue
        for part, (dtype, shape) in layout(module.scheme, module.out_features, module.in_features).items():
            located.require(f"{name}.{part}", dtype, shape)
        if module.bias is not None and located.find(f"{name}.bias") is None:
            raise AfpqError(f"tensor {name}.bias is not in the checkpoint; its files or its config are incomplete")


def _plain_linear(layer: AfpqLinear, dtype: torch.dtype) -> nn.Module:
    """The linear, or Conv1D, that a layer was made from, with the weight its codes say."""
    weight = layer.dequantize(dtype)
    plain: nn.Module
    if layer.conv1d:
        plain = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return plain


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a second registration raises
    register_quantization_config(QUANT_METHOD)(AfpqConfig)
    register_quantizer(QUANT_METHOD)(AfpqHfQuantizer)
