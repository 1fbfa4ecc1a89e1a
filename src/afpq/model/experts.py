# SPDX-License-Identifier: MIT
"""Mixtures of experts: split the 3-D parameters that Transformers keeps experts in into linears, and fuse them again.

A fused module holds `gate_up_proj` [experts, 2 * inner, hidden] (or `up_proj`, without a gate) and `down_proj`
[experts, hidden, inner]. `AfpqExperts` computes the same with three linears an expert, which are quantized, saved and
run like all others, under the names they have in the files of Mixtral, Qwen or DeepSeek.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afpq.errors import AfpqError
from afpq.model.tensor_part import TensorPart

GATED, PLAIN = "gate_up_proj", "up_proj"  # the fused parameter that reads the hidden states
DOWN, BIAS = "down_proj", "_bias"
NAMES = ("gate_proj", "up_proj", "down_proj")  # an expert's linears, unless the model's files have other names


@dataclass(frozen=True)
class ExpertForm:
    """The layout of a fused module's experts, found from its parameters and not from its class.

    `interleaved`: rows of gate and up alternate, as in gpt-oss. `linear_in_up`: a scale of up's channels reaches the
    input of `down_proj`. `names`: those of an expert's linears, gate (if any) and up, then down.
    """

    experts: int
    hidden: int
    inner: int
    transposed: bool
    interleaved: bool
    linear_in_up: bool
    bias: bool
    names: tuple[str, ...]

    @property
    def gated(self) -> bool:
        return len(self.names) == 3

    @property
    def fused(self) -> str:
        """The fused parameter that reads the hidden states."""
        return GATED if self.gated else PLAIN

    def linears(self) -> list[str]:
        """Return the name of every linear inside the module of experts, in order."""
        return [f"{index}.{leaf}" for index in range(self.experts) for leaf in self.names]

    def shape(self, leaf: str) -> tuple[int, int]:
        """Return [out, in] of an expert's linear."""
        return (self.hidden, self.inner) if leaf == self.names[-1] else (self.inner, self.hidden)

    def parts(self) -> Iterator[tuple[str, str, TensorPart]]:
        """Yield (linear, "weight" or "bias", its part of a fused parameter) for every weight and bias."""
        kinds = (("weight", ""), *((("bias", BIAS),) if self.bias else ()))
        for index in range(self.experts):
            for leaf in self.names:
                parameter = DOWN if leaf == self.names[-1] else self.fused
                for kind, suffix in kinds:
                    yield (
                        f"{index}.{leaf}",
                        kind,
                        TensorPart(parameter + suffix, index, self._rows(leaf), self.transposed),
                    )

    def _rows(self, leaf: str) -> tuple[int, int, int] | None:
        """Return the outputs (start, stop, step) of a fused parameter that belong to this leaf; None for all."""
        if not self.gated or leaf == self.names[-1]:
            return None
        index = self.names.index(leaf)
        start, stop = index * self.inner, (index + 1) * self.inner
        return (index, 2 * self.inner, 2) if self.interleaved else (start, stop, 1)


class Expert(nn.Module):
    """One expert, [tokens, hidden] -> [tokens, hidden]; its linears are children with the names of the form."""

    shell: Any

    def __init__(self, form: ExpertForm, shell: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.form = form
        self.__dict__["shell"] = shell  # shared by all experts; no submodule: it has no parameters
        for leaf in form.names:
            out_features, in_features = form.shape(leaf)
            self.add_module(leaf, nn.Linear(in_features, out_features, form.bias, device="meta", dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        *inputs, down = (getattr(self, leaf) for leaf in self.form.names)
        outputs = [linear(hidden) for linear in inputs]
        if len(outputs) == 1:
            return down(self.shell.act_fn(outputs[0]))  # type: ignore[no-any-return]
        return down(self.shell._apply_gate(_join(outputs, self.form.interleaved)))  # type: ignore[no-any-return]


class AfpqExperts(nn.Module):
    """The experts of a fused module as children named by their numbers; its `forward` has the same arguments."""

    shell: Any  # the fused module without its parameters

    def __init__(self, form: ExpertForm, shell: Any, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.form = form
        self.__dict__["shell"] = shell
        for index in range(form.experts):
            self.add_module(str(index), Expert(form, shell, dtype))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix experts: [tokens, hidden], each token's experts [tokens, k] and their weights -> [tokens, hidden].

        An index of `experts` or more means no expert. Sums in the order of the experts, as Transformers does.
        """
        total = torch.zeros_like(hidden)
        for index in torch.unique(top_k_index).tolist():
            if index < self.form.experts:
                token, position = torch.where(top_k_index == index)
                output = self.get_submodule(str(index))(hidden[token]) * top_k_weights[token, position, None]
                total.index_add_(0, token, output.to(total.dtype))
        return total


def _join(outputs: list[Tensor], interleaved: bool) -> Tensor:
    """Arrange gate and up as the fused parameter outputs them."""
    return torch.stack(outputs, dim=-1).flatten(-2) if interleaved else torch.cat(outputs, dim=-1)


def expert_form(module: nn.Module, names: tuple[str, ...] = NAMES) -> ExpertForm | None:
    """Return the form of a fused module of experts; None for anything else, or for an unsupported form."""
    parameters = dict(module.named_parameters())
    gated = GATED in parameters
    fused, down = parameters.get(GATED if gated else PLAIN), parameters.get(DOWN)
    known = {GATED if gated else PLAIN, DOWN}
    if fused is None or down is None or not known <= set(parameters) <= known | {name + BIAS for name in known}:
        return None
    if fused.ndim != 3 or down.ndim != 3 or not hasattr(module, "_apply_gate" if gated else "act_fn"):
        return None
    if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "is_transposed"):
        return None
    transposed = bool(module.is_transposed)
    experts, hidden, inner = (down.shape[i] for i in ((0, 2, 1) if transposed else (0, 1, 2)))
    outputs = (2 if gated else 1) * inner
    if tuple(fused.shape) != (experts, *((hidden, outputs) if transposed else (outputs, hidden))):
        return None
    behaviour = _behaviour(_shell(module), inner) if gated else (False, False)
    if behaviour is None:
        return None
    bias = f"{GATED if gated else PLAIN}{BIAS}" in parameters
    return ExpertForm(experts, hidden, inner, transposed, *behaviour, bias, names if gated else names[1:])


def _behaviour(shell: Any, inner: int) -> tuple[bool, bool] | None:
    """Find (interleaved, linear_in_up) of a gate by running it; None if the result is ambiguous."""
    generator = torch.Generator().manual_seed(0)
    gate = 0.5 + torch.rand(
        1, inner, generator=generator, device="cpu"
    )  # positive, so that a ReLU does not hide the difference
    up = torch.randn(1, inner, generator=generator, device="cpu")
    found = []
    for interleaved in (False, True):
        before = shell._apply_gate(_join([gate, up], interleaved))
        changed = up.clone()
        changed[0, 0] += 1
        difference = (shell._apply_gate(_join([gate, changed], interleaved)) - before).abs()[0]
        # A change of up's first channel must change the first output, and no other.
        if bool(difference[0] > 0) and not bool((difference[1:] > 0).any()):
            doubled = shell._apply_gate(_join([gate, 1e4 * up], interleaved))
            found.append((interleaved, bool(torch.allclose(doubled, 1e4 * before, rtol=1e-4))))
    return found[0] if len(found) == 1 or (found and inner == 1) else None


def _shell(module: nn.Module) -> Any:
    """Copy the module without its parameters; its activation is left."""
    shell = copy.copy(module)
    shell._parameters = {}
    return shell


def split_experts(module: nn.Module, form: ExpertForm) -> AfpqExperts:
    """Make the same experts as linears on the meta device; `fill_experts` gives them the fused weights."""
    dtype = next(module.parameters()).dtype
    return AfpqExperts(form, _shell(module), dtype)


@torch.no_grad()
def fill_experts(split: AfpqExperts, fused: nn.Module) -> None:
    """Give each linear its part of the fused parameters, as a view: nothing is copied."""
    for linear, kind, part in split.form.parts():
        value = part.of(fused.get_parameter(part.tensor))
        setattr(split.get_submodule(linear), kind, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def fuse_experts(split: AfpqExperts) -> nn.Module:
    """Return the fused module again, with the weights that the experts' linears (nn.Linear) have now."""
    form = split.form
    fused: nn.Module = copy.copy(split.shell)
    fused._parameters = {}
    like = split.get_submodule(form.linears()[0]).get_parameter("weight")
    for parameter, outputs, inputs in (
        (form.fused, (1 + form.gated) * form.inner, form.hidden),
        (DOWN, form.hidden, form.inner),
    ):
        shape = (form.experts, *((inputs, outputs) if form.transposed else (outputs, inputs)))
        fused.register_parameter(parameter, nn.Parameter(like.new_empty(shape), requires_grad=False))
        if form.bias:
            bias = like.new_empty(form.experts, outputs)
            fused.register_parameter(parameter + BIAS, nn.Parameter(bias, requires_grad=False))
    for name, kind, part in form.parts():
        place = part.of(fused.get_parameter(part.tensor))
        place.copy_(split.get_submodule(name).get_parameter(kind))
    return fused


def find_experts(model: nn.Module) -> dict[str, AfpqExperts]:
    """Return every module of experts that was split into linears, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AfpqExperts)}


def all_or_none(name: str, chosen: list[bool]) -> bool:
    """Whether a module of experts is quantized. Raises AfpqError if only some of its linears would be."""
    if any(chosen) and not all(chosen):
        raise AfpqError(
            f"{name}: {sum(chosen)} of its {len(chosen)} linears would be quantized; skip all experts of a layer or "
            "none (they may have different schemes)"
        )
    return any(chosen)
