# SPDX-License-Identifier: MIT
"""Check that a written model loads correctly, and computes as the original classes do with its weights.

`check_tensors` has compared the files with the checksums that were taken when their tensors were computed. Here, if
memory allows, the directory is loaded as users load it; every tensor that arrived must have that checksum too, every
quantized layer must give the outputs of the module that it stands for, and the model the logits of the original
classes. One unit of the plan, such as a block, is unpacked at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from afpq.checkpoint.plan import Plan, Target, loaded_bytes
from afpq.checkpoint.reader import Checkpoint
from afpq.checkpoint.verify import digest
from afpq.errors import AfpqError, one_line, out_of_memory
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.evaluation.memory import available_memory
from afpq.jobs.made_up_inputs import made_up_inputs
from afpq.jobs.reference_model import UnitWeights, fill_reference, unit_bytes
from afpq.kernels import set_compute
from afpq.model.coverage import kind_of_name
from afpq.model.experts import AfpqExperts, expert_form
from afpq.model.linear import PackedModule
from afpq.model.skeleton import build_skeleton
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import layout

MIN_FREE_RATIO = 4  # the model is loaded if it takes, with a unit unpacked, at most a quarter of the free memory
LAYER_TOLERANCE, LOGITS_TOLERANCE = 1e-3, 1e-2  # relative; float32 in another order differs by about 1e-6
MAX_KINDS = 4  # of layers that no input reached, named in the result


def check_reloaded(
    written: Checkpoint, plan: Plan, skeleton: nn.Module, digests: Mapping[str, str], trust_remote_code: bool = False
) -> str:
    """Load the model and compare it with what was computed; return what was done, or why not, as a sentence.

    `skeleton` is the architecture the plan was made with; `digests` are those of the files' tensors. Raises AfpqError
    naming the tensor that differs, and for a model that cannot run although the original classes can.
    """
    if loaded_bytes(plan) + unit_bytes(plan) > available_memory() // MIN_FREE_RATIO:
        return "The model was not loaded whole: that takes more than a quarter of the memory that was free."
    with _exact_arithmetic(), quiet_transformers():
        model = load_model(written.directory, trust_remote_code, "cpu")
        loaded, planned = type(model).__name__, type(skeleton).__name__
        if loaded != planned:  # other names for its tensors
            return f"It loads, as {loaded}, and was not compared: its files are of {planned}."
        _check_state(model, written, plan, digests)
        reference = build_skeleton(written.directory, trust_remote_code, original=True)
        try:
            weights = fill_reference(reference, model, plan)
        except AfpqError as error:
            return f"It loads, and every tensor arrived; its outputs were not compared: {error}."
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return _check_outputs(model, reference, weights, plan)


def _check_state(model: nn.Module, written: Checkpoint, plan: Plan, digests: Mapping[str, str]) -> None:
    """Check that every layer has its scheme, and every tensor its values."""
    state = model.state_dict()
    for target in plan.targets:
        layer = model.get_submodule(target.module)
        if not isinstance(layer, PackedModule) or layer.scheme != target.scheme:
            found = str(layer.scheme) if isinstance(layer, PackedModule) else "not quantized"
            raise AfpqError(f"self-test: {target.module} loads as {found}, made as {target.scheme}; this is a bug")
    arrived = {f"{t.module}.{part}": t.prefix + part for t in plan.targets for part in _parts(t)}
    # Tensors stored as the model has them; the outputs check parts of tensors and transposed ones.
    alike = {name: part.tensor for name, part in plan.names.items() if part == TensorPart(part.tensor)}
    arrived |= {name: tensor for name, tensor in alike.items() if tensor in written.tensors}
    for name, tensor in arrived.items():
        # Transformers changed a name that is missing while loading; the outputs check its tensor.
        if name in state and not _arrived(state[name], written, tensor, digests[tensor]):
            raise AfpqError(f"self-test: tensor {tensor} is not in the loaded model as it is in its file")


def _arrived(found: Tensor, written: Checkpoint, tensor: str, expected: str) -> bool:
    """Whether a loaded tensor is the file's, whose digest is `expected`; widened, it is narrowed again."""
    dtype = written.tensors[tensor].dtype
    if torch.promote_types(dtype, found.dtype) == found.dtype:
        return digest(found.to(dtype)) == expected
    return digest(written.read(tensor).to(found.dtype)) == digest(found)


def _check_outputs(model: Any, reference: Any, weights: UnitWeights, plan: Plan) -> str:
    """Compare the model's outputs with those of the original classes, on the first input that these take."""
    reason = "no input is known for it"
    for words, inputs in made_up_inputs(reference):
        hooks = _comparing_hooks(model, reference, plan)
        try:
            expected = _run(reference, inputs)
        except AfpqError:
            raise
        except Exception as error:  # foreign code, on an input that it may not be made for
            reason = _reason(error)
            continue
        finally:
            for hook in hooks:
                hook.remove()
        try:
            found = _run(model, inputs)
        except Exception as error:
            raise out_of_memory(error) or AfpqError(
                f"self-test: the quantized {type(model).__name__} cannot run, and the original classes with its "
                f"weights can ({_reason(error)}); this is a bug"
            ) from error
        if not bool(torch.isfinite(expected).all()):
            return f"It loads, and every tensor arrived; its outputs are not finite, on {words}."
        if found.shape != expected.shape or not _difference(found, expected) <= LOGITS_TOLERANCE:
            raise AfpqError("self-test: the loaded model's logits are not those of its files; this is a bug")
        what = "logits" if "tokens" in words else "outputs"
        untested = _untested(plan, weights)
        return f"Loaded again, it gave the {what} its files say, layer by layer, on {words}.{untested}"
    return (
        f"It loads, and every tensor arrived; its outputs were not compared: the self-test has no input that "
        f"{type(model).__name__} takes ({reason})."
    )


def _untested(plan: Plan, weights: UnitWeights) -> str:
    """Name the layers that the input did not reach."""
    missed = dict.fromkeys(kind_of_name(t.module) for t in plan.targets if t.module not in weights.used)
    if not missed:
        return ""
    more = f" and {len(missed) - MAX_KINDS} more" if len(missed) > MAX_KINDS else ""
    return f" That input does not reach {', '.join(list(missed)[:MAX_KINDS])}{more}: their outputs were not compared."


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's first output of real numbers: logits, or hidden states if it has no head."""
    torch.manual_seed(0)  # some models add noise
    found = next((t for t in _tensors(model(**inputs, return_dict=True)) if t.is_floating_point()), None)
    if found is None:
        raise TypeError("it returns no tensor of real numbers")
    return found


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors inside tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    members = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return [] if isinstance(value, str) else [tensor for member in members for tensor in _tensors(member)]


def _comparing_hooks(model: nn.Module, reference: nn.Module, plan: Plan) -> list[Any]:
    """Run the loaded layer beside each module of the original classes that it stands for, and compare their outputs."""
    targets = {target.module: target for target in plan.targets}
    if plan.ends.tied and plan.ends.embedding in targets:
        targets[plan.ends.head or ""] = targets[plan.ends.embedding]
    hooks = []
    for name, module in reference.named_modules():
        layer: nn.Module | None = model.get_submodule(name) if name in targets else None
        tensor = targets[name].tensor if name in targets else name
        if layer is None and expert_form(module) is not None:
            layer = model.get_submodule(name)
            layer = layer if isinstance(layer, AfpqExperts) else None
        if layer is not None:
            hooks.append(module.register_forward_hook(partial(_compare, tensor, layer), with_kwargs=True))
    return hooks


def _compare(
    tensor: str, layer: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
) -> None:
    """Raises AfpqError if a loaded layer's output is not that of the module it stands for."""
    expected = _tensors(output)
    try:
        found = _tensors(layer(*args, **kwargs))
    except Exception as error:
        raise out_of_memory(error) or AfpqError(
            f"self-test: {tensor}: the loaded layer cannot run in the place of {type(module).__name__} "
            f"({_reason(error)}); this is a bug"
        ) from error
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in expected]:
        raise AfpqError(
            f"self-test: {tensor}: the loaded layer gives another kind of output than {type(module).__name__}; this is "
            "a bug"
        )
    for ours, theirs in zip(found, expected):
        difference = _difference(ours.float(), theirs.float()) if bool(torch.isfinite(theirs).all()) else 0.0
        if not difference <= LAYER_TOLERANCE:
            raise AfpqError(
                f"self-test: {tensor}: the loaded layer's outputs differ from those of {type(module).__name__} with "
                f"its weight by {difference:.1e} of their norm; this is a bug"
            )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the expected norm; absolute if that is 0."""
    norm = float(expected.norm())
    return float((found - expected).norm()) / (norm or 1.0)


def _parts(target: Target) -> list[str]:
    return list(layout(target.scheme, *target.shape))


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Inside, kernels use exact arithmetic, whatever was chosen for generation."""
    before = set_compute("exact")
    try:
        yield
    finally:
        set_compute(before)
