# SPDX-License-Identifier: MIT
"""Generate text: continue a prompt or answer a chat, greedily or by sampling, and hand it over as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from afpq.errors import AfpqError, one_line
from afpq.evaluation.loading import context_length, generates

Message = dict[str, str]  # role ("system", "user" or "assistant") and content
UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn.

    `top_p`: from the likeliest tokens whose probabilities sum to it. `seed` of the draws; None: another one each time.
    Raises AfpqError for a number out of range, and for `top_p` or `seed` without a temperature.
    """

    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise AfpqError(f"temperature {self.temperature}: use a positive number, or 0 for the likeliest token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AfpqError(f"top-p {self.top_p}: use a number above 0, at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise AfpqError(f"seed {self.seed}: use a number from 0 to {2**63 - 1}")
        if self.temperature == 0 and (self.top_p is not None or self.seed is not None):
            raise AfpqError("top-p and seed have no effect at temperature 0: give a temperature above 0, such as 0.8")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of Transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def prompt_inputs(tokenizer: Any, prompt: str) -> dict[str, Tensor]:
    """Tokenize a text to continue: int64 [1, tokens] by name. Raises AfpqError for an empty one."""
    return _checked(tokenizer(prompt, return_tensors="pt"))


def chat_inputs(tokenizer: Any, messages: Sequence[Message]) -> dict[str, Tensor]:
    """Tokenize a conversation by the model's own template, up to where its answer begins: int64 [1, tokens] by name.

    Raises AfpqError if the tokenizer has no template, or the template refuses the messages (such as a system's).
    """
    require_template(tokenizer)
    try:
        found = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except Exception as error:  # templates come with models, and raise what they like
        reason = one_line(error) or type(error).__name__
        raise AfpqError(f"the model's chat template refuses the messages: {reason}") from None
    return _checked(found)


def require_template(tokenizer: Any) -> None:
    """Raise AfpqError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise AfpqError("the model's tokenizer has no chat template, as of a model that is not made for chats")


def _checked(found: Any) -> dict[str, Tensor]:
    inputs = {name: value for name, value in found.items() if name != "token_type_ids"}
    if inputs["input_ids"].shape[1] == 0:
        raise AfpqError("the prompt is empty; give at least one character")
    return inputs


@torch.no_grad()
def stream(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    write: Callable[[str], object],
    skip_prompt: bool = False,
) -> str:
    """Generate, hand every piece of text to `write` as soon as it is sure, and return them joined.

    The text begins with the prompt unless `skip_prompt`; an encoder-decoder's never does. Raises AfpqError for a model
    that does not generate text, and for a prompt that fills the model's context.
    """
    if not generates(model):
        raise AfpqError(f"{type(model).__name__} does not write text")
    tokens, limit = inputs["input_ids"].shape[1], context_length(model)
    if limit is not None and not model.config.is_encoder_decoder:
        if tokens >= limit:
            raise AfpqError(f"the prompt has {tokens} tokens, and the model's context {limit}; give a shorter one")
        max_new_tokens = min(max_new_tokens, limit - tokens)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    pieces = _Pieces(tokenizer, write, skip_prompt)
    given = {name: value.to(model.device) for name, value in inputs.items()}
    model.generate(**given, max_new_tokens=max_new_tokens, num_beams=1, streamer=pieces, **sampling.arguments)
    return pieces.text


class _Pieces(BaseStreamer):  # type: ignore[misc]
    """Decodes all tokens so far, since a token's text depends on those before, and hands over what is new and sure."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object], skip_prompt: bool) -> None:
        self.tokenizer, self.write, self.skip = tokenizer, write, skip_prompt
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the next token, or at first the prompt's."""
        if self.skip:
            self.skip = False
            return
        self.ids += value.flatten().tolist()
        sure = self._decoded().rstrip()  # spaces may yet be cleaned up, and characters completed
        if sure.endswith(UNFINISHED):
            return
        self._add(sure)

    def end(self) -> None:
        """Hand over the rest."""
        self._add(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _add(self, found: str) -> None:
        if new := found[len(self.text) :]:
            self.write(new)
            self.text += new


def generate_text(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """Return the prompt and its greedy continuation (an encoder-decoder's answer). Raises as `stream` does."""
    if not generates(model):
        raise AfpqError(f"{type(model).__name__} does not write text")
    inputs = prompt_inputs(tokenizer, prompt)
    return stream(model, tokenizer, inputs, max_new_tokens, Sampling(), lambda _: None)
