# SPDX-License-Identifier: MIT
"""Check that the written files equal the computed tensors and load correctly, before a result gets its name.

First every tensor is read back from the files and compared with the checksum taken when it was computed. Then, if
memory allows, the directory is loaded as users load it, and on a short window every quantized layer must give the
outputs of its written tensors, and the model the logits that follow. One layer is unpacked at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from afpq.checkpoint.plan import Plan, Target, loaded_bytes
from afpq.checkpoint.reader import Checkpoint
from afpq.checkpoint.verify import digest
from afpq.errors import AfpqError
from afpq.evaluation.loading import load_model, quiet_transformers
from afpq.evaluation.memory import available_memory
from afpq.kernels import set_compute
from afpq.model.embedding import AfpqEmbedding, AfpqTiedHead
from afpq.model.linear import AfpqLinear, PackedModule
from afpq.model.tensor_part import TensorPart
from afpq.numerics.packing import from_tensors, layout

MIN_FREE_RATIO = 4  # the model is loaded if it takes at most a quarter of the free memory
WINDOW_TOKENS = 16  # tokens
LAYER_TOLERANCE, LOGITS_TOLERANCE = 1e-3, 1e-2  # relative; float32 in another order differs by about 1e-6


def check_reloaded(written: Checkpoint, plan: Plan, skeleton: nn.Module, trust_remote_code: bool = False) -> str:
    """Load the model and compare it with its files; return what was done, or why not, as a sentence.

    `skeleton` is the architecture the plan was made with. Raises AfpqError naming the tensor that differs.
    """
    if loaded_bytes(plan) > available_memory() // MIN_FREE_RATIO:
        return "The model was not loaded whole: that takes more than a quarter of the memory that was free."
    with _exact_arithmetic(), quiet_transformers():
        model = load_model(written.directory, trust_remote_code, "cpu")
        loaded, planned = type(model).__name__, type(skeleton).__name__
        if loaded != planned:  # other names for its tensors
            return f"It loads, as {loaded}, and was not compared: its files are of {planned}."
        _check_state(model, written, plan)
        return _check_outputs(model, written, plan)


def _check_state(model: nn.Module, written: Checkpoint, plan: Plan) -> None:
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
        if name in state and digest(written.read(tensor).to(state[name].dtype)) != digest(state[name]):
            raise AfpqError(f"self-test: tensor {tensor} is not in the loaded model as it is in its file")


@torch.no_grad()
def _check_outputs(model: Any, written: Checkpoint, plan: Plan) -> str:
    """Compare the logits with those for which every quantized layer's output is computed from its file."""
    tokens = torch.arange(WINDOW_TOKENS)[None] * 7919 % model.get_input_embeddings().num_embeddings
    try:
        logits = _run(model, tokens)
    except AfpqError:
        raise
    except Exception as error:  # foreign code, which may need hardware that this machine lacks
        reason = " ".join(str(error).split())[:200]
        return f"It loads, and every tensor arrived; it cannot run on this machine ({type(error).__name__}: {reason})."
    by_module = {target.module: target for target in plan.targets}
    hooks = []
    for name, module in model.named_modules():
        tied = isinstance(module, AfpqTiedHead)  # it reads the embedding's table, the only other target outside
        target = plan.end_targets[0] if tied else by_module.get(name)
        if target is not None:
            hooks.append(module.register_forward_hook(_comparing(target, written)))
    expected = _run(model, tokens)
    for hook in hooks:
        hook.remove()
    if not bool(torch.isfinite(expected).all()):
        return "It loads, and every tensor arrived; its logits are not finite, on a window of made-up tokens."
    if not _difference(logits, expected) <= LOGITS_TOLERANCE:
        raise AfpqError("self-test: the loaded model's logits are not those of its files; this is a bug")
    return f"Loaded again, it gave the logits its files say, layer by layer, on {WINDOW_TOKENS} tokens."


def _run(model: Any, tokens: Tensor) -> Tensor:
    """Return the model's first output: logits, or hidden states if it has no head. A decoder reads the tokens too."""
    decoded = {"decoder_input_ids": tokens} if getattr(model.config, "is_encoder_decoder", False) else {}
    result = model(input_ids=tokens, **decoded, return_dict=True)
    return next(value for value in result.values() if isinstance(value, Tensor))


def _comparing(target: Target, written: Checkpoint) -> Callable[..., Tensor | None]:
    """Make a forward hook that compares a layer's output with the file's, and replaces it."""

    def compare(layer: AfpqLinear | AfpqEmbedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        tensors = {part: written.read(target.prefix + part) for part in _parts(target)}
        weight = from_tensors(tensors, target.scheme, target.shape[1]).dequantize()
        if isinstance(layer, AfpqEmbedding):
            expected = embedding(inputs[0], weight) * layer.factor()
        else:
            expected = linear(inputs[0].float(), weight, None if layer.bias is None else layer.bias.float())
        if not bool(torch.isfinite(expected).all()):
            return None
        difference = _difference(output.float(), expected)
        if not difference <= LAYER_TOLERANCE:
            raise AfpqError(
                f"self-test: {target.tensor}: the loaded layer's outputs differ from what its tensors say by "
                f"{difference:.1e} of their norm; this is a bug"
            )
        return expected.to(output.dtype)

    return compare


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
