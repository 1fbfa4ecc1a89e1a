# SPDX-License-Identifier: MIT
"""The Transformers plug-in: quantize while loading, and load saved models. Importing this file registers it.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=AfpqConfig(format="nf4"))
    AutoModelForCausalLM.from_pretrained("a directory written by afpq")
    AutoModelForCausalLM.from_pretrained("the same", quantization_config=AfpqConfig(dequantize=True))

It uses only hooks that are unchanged since Transformers 5.0. Before any weight is loaded, every tensor that the model
expects is looked up in the checkpoint's headers: Transformers would leave a missing or misshapen one as uninitialized
memory, with a warning at most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from afpq.algorithms.methods import METHODS
from afpq.checkpoint.locate import TensorLookup, check_headers, saved_name
from afpq.checkpoint.plan import settled_recipe
from afpq.checkpoint.quantization_config import ENDS, QUANT_METHOD, config_from_json, config_to_json, ends_to_json
from afpq.checkpoint.reader import TensorInfo, tensor_headers
from afpq.checkpoint.saved_modules import SavedModules
from afpq.checkpoint.unaware_loaders import lift_guard
from afpq.checkpoint.wrappers import wrapper_of
from afpq.errors import AfpqError
from afpq.integrations.guarded_saves import wrap_save
from afpq.integrations.hub import wrap_upload
from afpq.integrations.missing_tensors import absent_tensors, check_missing
from afpq.integrations.part_configs import wrap_part_configs
from afpq.integrations.quantize_loaded import QuantizeLoaded
from afpq.model.blocks import find_blocks, in_blocks, left_linears
from afpq.model.coverage import warn_of_left
from afpq.model.dequantize import unpack_model
from afpq.model.embedding import AfpqEmbedding
from afpq.model.embedding_and_head import EmbeddingAndHead, saved_ends, settle_recipe
from afpq.model.experts import expert_form, find_experts
from afpq.model.linear import PackedModule
from afpq.model.packed_modules import (
    convertible,
    is_loading_slot,
    linear_names,
    mark_initialized,
    pack_ends,
    pack_matrices,
)
from afpq.model.patterns import check_entries, check_patterns
from afpq.model.renamed_tensors import ExpertMerge
from afpq.numerics.scheme import Scheme
from afpq.recipe import Recipe, is_kept


class AfpqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization of a model, to be done or saved: the `quantization_config` of its config.json.

    bits (2, 3, 4, 8) picks the normal-float format of that width unless `format` names one; `sym=False` means a
    scale for each sign (a zero point for integer formats). What is left out is as in
    `scheme.DEFAULT_SCHEME`, quantized by rtn. `modules_to_not_convert` holds names or patterns of
    modules left alone; `dynamic` maps "+:regex" to keys that override, "-:regex" to skip. The output head and the
    embedding stay as they are unless `lm_head` and `embedding` give a scheme: its text, its keys, or "same" as the
    rest; tied ones are one weight. `dequantize` loads a saved model with float weights; everything else then comes
    from the saved model. Raises AfpqError for invalid values.
    """

    dequantize = False  # set in an instance only if requested: an option of loading, never saved

    def __init__(
        self,
        bits: int | None = None,
        format: str | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        scale_dtype: str | None = None,
        method: str | None = None,
        scale_search: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        dynamic: dict[str, Any] | None = None,
        lm_head: dict[str, Any] | str | None = None,
        embedding: dict[str, Any] | str | None = None,
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
        """Return (recipe, modules_to_not_convert)."""
        return config_from_json(self.__dict__)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the keys that a config given to `from_pretrained` changes in the saved one."""
        return {"dequantize": True} if self.dequantize else {}


class AfpqHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer: replaces linears by AfpqLinear before loading, then fills them or quantizes what is loaded."""

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
        """Check nothing: the plain-torch kernels run everywhere."""

    def update_attn_implementation(self, config: Any) -> Any:
        """The hook (since Transformers 5.18) that gets the config before the weights' files are looked for."""
        lift_guard(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same hook up to Transformers 5.20."""
        return self.update_attn_implementation(super().update_tp_plan(config))

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.failures: list[AfpqError] = []
        self.merges: list[ExpertMerge] = []
        self.absent: list[str] = []  # tensors that are not in the headers under their names
        self.base_renaming: tuple[str, str] | None = None  # prefix of the base model: in files, in the model
        if self.quantization_config.dequantize and not self.pre_quantized:
            raise AfpqError("dequantize=True is for a checkpoint that is quantized already; this one is not")
        recipe, kept = self.quantization_config.recipe()
        if not self.pre_quantized and not METHODS[recipe.method].while_loading:
            raise AfpqError(f"method {recipe.method!r} needs calibration; use afpq.quantize, and load its result")
        other = next((file for file in checkpoint_files or () if not file.endswith(".safetensors")), None)
        if self.pre_quantized and other is not None:
            raise AfpqError(f"{other}: a quantized model is read from safetensors only")
        self.directory = Path(checkpoint_files[0]).parent if checkpoint_files else None  # with the card to upload
        headers = {key: info for file in checkpoint_files or () for key, info in _headers_of(file).items()}
        located = TensorLookup(headers, model)
        added = next((part for key in headers if (part := wrapper_of(key))), "")
        self.misnamed = f" (names in the files hold {added!r}; afpq quantize reads them without it)" if added else ""
        held = SavedModules(model, located) if self.pre_quantized and checkpoint_files is not None else None
        recipe, ends = self._settle(model, recipe, located, held)
        schemes = ends.schemes(recipe)

        def scheme_of(name: str) -> Scheme | None:
            saved = saved_name(name, located)
            scheme = None if is_kept(saved, kept) or name in schemes else recipe.scheme_for(saved)
            return scheme if scheme is None or held is None or held.is_packed(name, scheme) else None

        # A saved model lists every linear it kept; the blocks matter only for a new one.
        blocks, left = {block.name for block in find_blocks(model)}, left_linears(model)
        none_fits = any(in_blocks(name, blocks) for name in left) and not any(
            in_blocks(name, blocks) for name, _ in convertible(model)
        )
        places = None if self.pre_quantized else blocks
        if not self.pre_quantized:
            names = {name: saved_name(name, located) for name in linear_names(model, blocks)}
            others = [saved_name(name.rpartition(".")[0], located) + ".weight" for name in model.state_dict()]
            check_patterns(recipe, list(names.values()), others)
            check_entries(kept, list(names.values()), others)
        pack_matrices(model, places, scheme_of, located.names.leaves(), self.pre_quantized)
        pack_ends(model, ends, recipe, kept, self.pre_quantized)
        if not any(isinstance(module, PackedModule) for module in model.modules()) and not none_fits:
            if held is None:
                raise AfpqError("no linear layer left to quantize; see modules_to_not_convert and dynamic")
            held.check_nothing_packed([name for name, m in convertible(model) if expert_form(m) is None])
        self.settled, self.ends, self.learned = recipe, ends, _unlearned(model)
        if self.pre_quantized and self.learned:
            raise AfpqError(f"quantization_config: no code book for {self.learned[0]}; config.json is incomplete")
        mark_initialized(model)
        if find_experts(model):
            self.merges = located.names.merges
        if self.pre_quantized and checkpoint_files is not None:
            check_headers(model, located)
            self.absent = absent_tensors(model, located)
            self.base_renaming = located.base_renaming()
        rest = {name for name, _ in convertible(model)} | left.keys()
        if self.pre_quantized:  # those of another class than the saved one, or with a float weight after all
            rest = {name for name in rest if not is_kept(saved_name(name, located), kept)}
        self._note(recipe, rest | set(kept))

    def _settle(
        self, model: PreTrainedModel, recipe: Recipe, located: TensorLookup, held: SavedModules | None
    ) -> tuple[Recipe, EmbeddingAndHead]:
        """Return the recipe with its schemes of the ends, and the ends: tied unless the checkpoint stores both."""
        if not self.pre_quantized:
            return settle_recipe(model, recipe, located.hold_different_values)
        ends = saved_ends(model, lambda name: located.find(name) is not None)
        return (recipe if held is None else held.settle_ends(recipe, ends)), ends

    def _note(self, recipe: Recipe, kept: set[str]) -> None:
        """Write what is packed in the model, and what is not, to the config that is saved with it."""
        config = self.quantization_config
        config.modules_to_not_convert = sorted(kept)
        for end in ENDS:
            config.__dict__.pop(end, None)
        config.__dict__.update(ends_to_json(recipe))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.failures:
            raise self.failures[0]
        check_missing(model, self.absent)
        for name, module in model.named_modules():
            left = next((p for p in module._parameters if is_loading_slot(module, p)), None)
            if left is not None:
                raise AfpqError(
                    f"{name}.{left}: not in the checkpoint, or not under this name{self.misnamed}; list it as not to "
                    "convert"
                )
            if isinstance(module, PackedModule):
                module.check_scales(name)
                module.settle() if isinstance(module, AfpqEmbedding) else module.prepare()
        if not self.pre_quantized:
            if self.learned:
                self._note_codebooks(model)
            warn_of_left(model)
        if self.quantization_config.dequantize:  # Transformers has dropped the config here, but the weights are packed
            unpack_model(model, model.dtype)
        return model

    def _note_codebooks(self, model: PreTrainedModel) -> None:
        """Write the codebook that each layer has learned to the config, where it is saved."""
        schemes = {name: model.get_submodule(name).scheme for name in self.learned}
        recipe, config = settled_recipe(self.settled, self.ends, schemes), self.quantization_config
        skips = {key: value for key, value in config.dynamic.items() if key.startswith("-:")}
        config.dynamic = skips | config_to_json(recipe, ())["dynamic"]
        config.__dict__.update(ends_to_json(recipe))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        parent, _dot, name = param_name.rpartition(".")
        return is_loading_slot(model.get_submodule(parent), name)

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """Return the renamings that Transformers' table lacks: of experts that are not merged, of the base model."""
        moved = {(m.in_files, m.merged) for m in self.merges if m.in_files != m.merged} if self.pre_quantized else set()
        renamings = [WeightRenaming(f"{in_files}.", f"{merged}.") for in_files, merged in sorted(moved)]
        if self.base_renaming is not None:
            in_files, in_model = self.base_renaming
            renamings.append(WeightRenaming(f"^{in_files}.", f"{in_model}."))
        return renamings

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeLoaded(self.failures, self.quantization_config.recipe()[0].search)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace packed modules by float ones, so that the model is an ordinary one in `dtype` (by default its own).

        Everything that is in the model's dtype is cast too, since it computes with the weights. Raises AfpqError, with
        the model unchanged, for a weight too large for `dtype` or one that is offloaded.
        """
        unpack_model(model, dtype or model.dtype)
        self.remove_quantization_config(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.config.__dict__.pop("_is_quantized", None)
        return model


def _unlearned(model: nn.Module) -> list[str]:
    """Return the packed modules whose codebooks are still to be learned."""
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedModule)]
    return [name for name, module in packed if module.scheme.format.learned]


def _headers_of(file: str) -> dict[str, TensorInfo]:
    """Read the headers of a safetensors file; any other file has none."""
    return tensor_headers(Path(file)) if file.endswith(".safetensors") else {}


if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:  # a second registration raises
    register_quantization_config(QUANT_METHOD)(AfpqConfig)
    register_quantizer(QUANT_METHOD)(AfpqHfQuantizer)
    wrap_upload()
    wrap_save()
    wrap_part_configs()
    # Methods whose config may be given in addition to a saved one. There is no hook for it; the first 5.x have no list
    # either, and warn that they use the saved config.
    if hasattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"):
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (AfpqConfig,)
