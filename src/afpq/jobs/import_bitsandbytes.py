# SPDX-License-Identifier: MIT
"""`afpq.import_model`: rewrite a checkpoint that bitsandbytes quantized to 4 bits in our layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from afpq.checkpoint.card_header import LOAD
from afpq.checkpoint.locate import TensorLookup
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan, Target
from afpq.checkpoint.quantization_config import config_to_json
from afpq.checkpoint.reader import Checkpoint, TensorInfo, open_checkpoint
from afpq.checkpoint.unaware_loaders import guarded
from afpq.errors import AfpqError
from afpq.evaluation.tables import size_text
from afpq.jobs.bitsandbytes_format import BnbWeight, find_weights, fits_float16, read_absmax, read_format, read_weight
from afpq.jobs.conversion_card import Provenance, provenance_card
from afpq.jobs.finite_values import check_kept
from afpq.jobs.rewrite import Rewrite, rewrite
from afpq.jobs.selftest import check_reloaded
from afpq.model.blocks import TransposedLinear, is_linear, left_linears
from afpq.model.skeleton import build_skeleton
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import to_tensors
from afpq.numerics.scheme import Scheme
from afpq.numerics.size import Size
from afpq.progress import Progress
from afpq.recipe import Recipe
from afpq.version import __version__

SCALE_DTYPES = ("float16", "float32")  # rows of SCALE_STORAGES that hold absmax values as they are


@dataclass(frozen=True)
class Imported:
    """Figures of an import. True bits are over the quantized weights with everything stored for them.

    `schemes` counts layers; `exact`: every weight keeps its value, to the last bit of float32.
    """

    kind: str
    layers: int
    weights: int
    schemes: dict[str, int]
    bits_per_weight: float
    bits_before: float
    exact: bool
    input_bytes: int
    output_bytes: int
    self_test: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_model(
    model: str | Path,
    out: str | Path,
    *,
    scale_dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Write the bitsandbytes checkpoint `model` (a directory or hub id; nf4 or fp4) in our layout into `out`.

    Weights keep their values exactly. Scales are stored as float16 if that is lossless, else as float32; `scale_dtype`
    forces one, and float16 then rounds double-quantized scales. bitsandbytes is not needed. Raises AfpqError for any
    other checkpoint, a broken one, and layers whose rows and blocks have too small a common divisor.
    """
    if scale_dtype not in (None, *SCALE_DTYPES):
        raise AfpqError(f"scale dtype {scale_dtype!r}; known here: {', '.join(SCALE_DTYPES)}")
    checkpoint = open_checkpoint(model)
    _check_method(checkpoint)
    weights = find_weights(checkpoint)
    if not weights:
        raise AfpqError(f"{checkpoint.directory}: no 4-bit weights of bitsandbytes in it")
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    fitting = {name: _scheme(checkpoint, weight, None) for name, weight in weights.items()}
    chosen = {name: _scheme(checkpoint, weight, scale_dtype) for name, weight in weights.items()}
    plan = _plan(checkpoint, skeleton, weights, chosen)
    check_kept(plan, skeleton)
    elements = sum(weight.elements for weight in weights.values())
    before = sum(checkpoint.tensors[part].bytes for weight in weights.values() for part in weight.parts)
    result = Imported(
        kind=" and ".join(sorted({weight.kind for weight in weights.values()})),
        layers=len(weights),
        weights=elements,
        schemes=dict(Counter(str(scheme) for scheme in chosen.values()).most_common()),
        bits_per_weight=plan.bits_per_weight,
        bits_before=Size(before, elements).bits,
        exact=all(_holds(chosen[name], fitting[name]) for name in weights),
        input_bytes=sum(info.bytes for info in checkpoint.tensors.values()),
        output_bytes=plan.output_bytes,
    )
    config = guarded({**plan.checkpoint.config, "quantization_config": _config(plan, weights)})
    job = Rewrite(plan.checkpoint, plan.outputs(), config, _card(str(model), plan, result))
    self_test = rewrite(
        job,
        Path(out),
        _tensors(checkpoint, plan, weights),
        progress,
        lambda written, digests: check_reloaded(written, plan, skeleton, digests, trust_remote_code),
    )
    return replace(result, self_test=self_test)


def _check_method(checkpoint: Checkpoint) -> None:
    keys = checkpoint.config.get("quantization_config")
    if not isinstance(keys, dict):
        raise AfpqError(f"{checkpoint.directory}: not quantized; afpq quantize takes it as it is")
    method = keys.get("quant_method", "bitsandbytes" if "load_in_4bit" in keys else None)
    if method != "bitsandbytes":
        raise AfpqError(f"{checkpoint.directory}: quantized by {method!r}; only bitsandbytes can be imported")
    if not keys.get("load_in_4bit"):
        raise AfpqError(f"{checkpoint.directory}: 8 bits of bitsandbytes; only its 4-bit formats can be imported")


def _scheme(checkpoint: Checkpoint, weight: BnbWeight, scale_dtype: str | None) -> Scheme:
    """Return a weight's scheme; by default with the smallest dtype that holds its scales exactly."""
    if scale_dtype is None:
        scale_dtype = "float16" if fits_float16(read_absmax(checkpoint, weight)) else "float32"
    return Scheme(read_format(checkpoint, weight)[0], weight.group_size, True, scale_dtype)


def _holds(chosen: Scheme, fitting: Scheme) -> bool:
    return chosen.scale_dtype in (fitting.scale_dtype, "float32")


def _plan(
    checkpoint: Checkpoint, skeleton: PreTrainedModel, weights: dict[str, BnbWeight], schemes: dict[str, Scheme]
) -> Plan:
    """Make a plan as for the float model, in which exactly the packed linears are targets."""
    plain = _as_floats(checkpoint, weights)
    linears = {name: module for name, module in skeleton.named_modules() if is_linear(module)}
    located = TensorLookup(plain.tensors, skeleton)
    tensors = {
        name: located.find(f"{name}.weight") for name, m in linears.items() if not isinstance(m, TransposedLinear)
    }
    packed = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor in weights}
    unknown = next((name for name in weights if name not in packed.values()), None)
    if unknown is not None:
        reason = left_linears(skeleton).get(unknown.removesuffix(".weight"), "of this architecture")
        raise AfpqError(f"{checkpoint.directory}: {unknown} is not the weight of a plain linear layer ({reason})")
    by_module = {name: schemes[tensor] for name, tensor in packed.items()}
    left = [re.escape(name) for name in linears if name not in packed]
    usual = Counter(by_module.values()).most_common(1)[0][0]
    skip = (f"^({'|'.join(left)})$",) if left else ()
    plan = make_plan(plain, skeleton, Recipe(usual, skip=skip, overrides=_overrides(by_module, usual)))
    return _with_outsiders(plan, {tensor: name for name, tensor in packed.items()}, weights, schemes)


def _as_floats(checkpoint: Checkpoint, weights: dict[str, BnbWeight]) -> Checkpoint:
    """Return the headers as before bitsandbytes; packed tensors cannot be read by them."""
    hidden = {part for weight in weights.values() for part in weight.parts if part != weight.tensor}
    tensors = {
        name: TensorInfo(weights[name].dtype, weights[name].shape, info.file) if name in weights else info
        for name, info in checkpoint.tensors.items()
        if name not in hidden
    }
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return Checkpoint(checkpoint.directory, config, tensors)


def _overrides(schemes: dict[str, Scheme], usual: Scheme) -> tuple[tuple[str, Scheme], ...]:
    """Return patterns for the modules with an unusual scheme: one for a kind of layer if all of it has the same."""
    kinds: dict[str, set[Scheme]] = {}
    for name, scheme in schemes.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(scheme)
    found: dict[str, Scheme] = {}
    for name, scheme in schemes.items():
        kind = name.rpartition(".")[2]
        if scheme != usual:
            found[rf"(^|\.){re.escape(kind)}$" if len(kinds[kind]) == 1 else f"^{re.escape(name)}$"] = scheme
    return tuple(found.items())


def _with_outsiders(
    plan: Plan, modules: dict[str, str], weights: dict[str, BnbWeight], schemes: dict[str, Scheme]
) -> Plan:
    """Add packed linears outside the blocks to the plan: bitsandbytes quantizes them, we by default do not."""
    units = []
    for unit in plan.units:
        packed = [name for name in unit.tensors if name in weights]
        outside = {name: (_target(modules[name], weights[name], schemes[name]),) for name in packed}
        units.append(replace(unit, replaced={**outside, **unit.replaced}))
    kept = tuple(name for name in plan.kept if name not in modules.values())
    return replace(plan, units=tuple(units), kept=kept)


def _target(module: str, weight: BnbWeight, scheme: Scheme) -> Target:
    return Target(module, TensorPart(weight.tensor), scheme, weight.shape, weight.tensor.removesuffix("weight"))


def _tensors(checkpoint: Checkpoint, plan: Plan, weights: dict[str, BnbWeight]) -> Iterator[tuple[str, Tensor]]:
    for unit in plan.units:
        targets = {target.source.tensor: target for target in unit.targets}
        for name in unit.tensors:
            target = targets.get(name)
            if target is None:
                yield name, checkpoint.read(name)
            else:
                parts = to_tensors(read_weight(checkpoint, weights[name], target.scheme))
                yield from ((target.prefix + part, tensor) for part, tensor in parts.items())


def _config(plan: Plan, weights: dict[str, BnbWeight]) -> dict[str, Any]:
    first = next(iter(weights.values()))
    origin = {
        "quant_method": "bitsandbytes",
        "quant_type": first.kind,
        "blocksize": first.blocksize,
        "double_quant": first.nested is not None,
    }
    made = f"afpq {__version__}"
    return {**config_to_json(plan.recipe, plan.kept), "imported_from": origin, "made_by": made}


def _card(model: str, plan: Plan, result: Imported) -> str:
    values = "exactly the values they had" if result.exact else "the codes they had, and scales rounded to float16"
    bits = f"{result.bits_per_weight:.3f} true bits for a quantized weight (bitsandbytes: {result.bits_before:.3f})"
    return provenance_card(
        Provenance(
            model,
            plan.checkpoint,
            "imported from bitsandbytes",
            f"with the 4-bit weights of {{model}}, which bitsandbytes quantized ({result.kind}), in the layout of "
            f"afpq: {values}.",
            (
                f"{result.layers} linear layers with {result.weights:,} weights, {bits}.",
                f"Size: {size_text(result.output_bytes)} (bitsandbytes: {size_text(result.input_bytes)}).",
            ),
            ("afpq", "quantized", "4-bit", plan.recipe.scheme.format.name.partition(":")[0]),
            LOAD,
        )
    )
