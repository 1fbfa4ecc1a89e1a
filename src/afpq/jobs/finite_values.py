# SPDX-License-Identifier: MIT
"""NaN and Inf in what a plan keeps as it is: norms, biases, embeddings, layers that are skipped.

Weights that are quantized are checked when they are; all others would only be copied, and a NaN in a norm makes a
model whose every logit is NaN. They are read once before anything is computed or made, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from afpq.checkpoint.plan import KeptPart, Plan
from afpq.errors import AfpqError
from afpq.model.tensor_part import TensorPart


def check_kept(plan: Plan, model: nn.Module) -> None:
    """Read every float tensor that is kept and feeds a parameter of `model`, the skeleton the plan was made with.

    Buffers may hold infinities on purpose (masks), and tensors that the model does not have are never computed with:
    both pass. Raises AfpqError naming the first tensor with NaN or Inf.
    """
    for part in _kept_parameters(plan, model):
        floats = plan.checkpoint.tensors[part.tensor].dtype.is_floating_point
        if floats and not is_finite(plan.checkpoint.read_part(part)):
            raise AfpqError(f"tensor {part.tensor} contains NaN or Inf; repair it")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a float tensor are. In one pass: its least and greatest are NaN if one number is."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8, which has no such kernel
        tensor = tensor.float()
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _kept_parameters(plan: Plan, model: nn.Module) -> Iterator[TensorPart]:
    """Where the parameters are that are not quantized.

    Where Transformers makes parameters from tensors of other names, in ways that the plan does not follow, any tensor
    without a name may be one.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = set(model.state_dict())
    named = {part.tensor: name for name, part in plan.names.items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    converted = bool(parameters - plan.names.keys() - tied)
    for unit in plan.units:
        for tensor in unit.tensors:
            if tensor not in unit.replaced:
                name = named.get(tensor, tensor)
                if name in parameters or (converted and name not in state and tensor not in named):
                    yield TensorPart(tensor)
            yield from (part.source for part in unit.replaced.get(tensor, ()) if isinstance(part, KeptPart))
