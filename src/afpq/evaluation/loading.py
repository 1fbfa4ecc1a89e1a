# SPDX-License-Identifier: MIT
"""Load a model, quantized or not, to run it; failures are one clear error instead of a library's traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging

from afpq.algorithms.methods import NEAREST
from afpq.checkpoint.quantization_config import QUANT_METHOD
from afpq.checkpoint.reader import open_checkpoint
from afpq.checkpoint.wrappers import unwrap, wrapper_of
from afpq.errors import AfpqError, in_all, one_line
from afpq.evaluation.decoded_weights import decoded_weights
from afpq.evaluation.devices import find_device
from afpq.integrations import transformers as _plugin  # noqa: F401  (registers the method with Transformers)
from afpq.model.blocks import end
from afpq.model.skeleton import build_skeleton, model_class, read_config

T = TypeVar("T")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, Transformers shows no progress bars and no warnings: our own output has what matters."""
    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def load_model(model: str | Path, trust_remote_code: bool = False, device: str = "auto") -> Any:
    """Load the model that config.json names, in evaluation mode on `device`: in its own dtype, on a CPU in float32.

    The checkpoint is checked first. Raises AfpqError as `reader.open_checkpoint` does, if Transformers cannot load it,
    and for a device that cannot be used.
    """
    place = find_device(device)
    checkpoint = open_checkpoint(model)
    directory, keys = checkpoint.directory, checkpoint.config.get("quantization_config")
    if keys is not None:
        method = keys.get("quant_method") if isinstance(keys, dict) else keys
        if not isinstance(method, str) or method not in AUTO_QUANTIZER_MAPPING:
            raise AfpqError(f"{model}: quantized by {str(method)[:80]!r}, which Transformers cannot load here")
    config, wrapper = read_config(directory, trust_remote_code), ""
    place_or_weights: dict[str, Any] = {"pretrained_model_name_or_path": directory}
    if any(map(wrapper_of, checkpoint.tensors)):
        checkpoint, wrapper = unwrap(checkpoint, build_skeleton(directory, trust_remote_code))
    if checkpoint.published is not None or wrapper:
        place_or_weights = decoded_weights(checkpoint, config, torch.float32 if place.type == "cpu" else None)
    loaded, report = _guarded(
        model,
        lambda: model_class(config, trust_remote_code).from_pretrained(
            **place_or_weights,
            dtype=torch.float32 if place.type == "cpu" else "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        ),
    )
    missing = sorted(report["missing_keys"])
    if missing:  # Transformers would fill them with random numbers
        raise AfpqError(f"{model}: the checkpoint lacks {missing[0]}{in_all(len(missing), 'tensor')}")
    if place.type == "cpu" and (keys is None or keys.get("quant_method") == QUANT_METHOD):
        loaded.to(torch.float32)  # older Transformers leave tensors they rename in the dtype of the file
    return loaded.to(place).eval()


def require_next_token(model: Any) -> None:
    """Raise AfpqError for a model that does not predict the next token of its input, such as an encoder.

    The perplexity of its logits, if it has any, would be meaningless.
    """
    config = getattr(model, "config", None)
    if not generates(model) or getattr(config, "is_encoder_decoder", False) or _streams(config) > 1:
        raise AfpqError(
            f"{type(model).__name__} does not predict the next token of the text it reads; "
            "perplexity and KL are for models that do"
        )


def require_text(model: Any, user: str) -> None:
    """Raise AfpqError for a model that reads no text, of images or sound; `user` is what needs text, in words."""
    if not isinstance(end(model, "get_input_embeddings"), nn.Embedding) or _streams(model.config) > 1:
        raise AfpqError(
            f"{type(model).__name__} does not read text, which {user} needs; use --method {NEAREST}, without options "
            "that need text"
        )


def _streams(config: Any) -> int:
    """Return how many streams of tokens a model of sound reads at once; 1 for text."""
    streams = getattr(config, "num_codebooks", None)
    return streams if isinstance(streams, int) else 1


def generates(model: Any) -> bool:
    """Whether a model, or its skeleton, generates text; assumed for code that is not Transformers' own."""
    return not type(model).__module__.startswith("transformers.models.") or bool(model.can_generate())


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a model's directory. Raises AfpqError if there is none."""
    directory = open_checkpoint(model).directory
    return _guarded(model, lambda: AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code))


def window_length(model: nn.Module, wanted: int) -> int:
    """Return the tokens in a window of text: as many as wanted, at most the model's context."""
    return min(wanted, context_length(model) or wanted)


def context_length(model: nn.Module) -> int | None:
    """Return the model's context in tokens; None if its config does not state it."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 1 else None


def _guarded(model: str | Path, load: Callable[[], T]) -> T:
    try:
        return load()
    except AfpqError:
        raise
    except Exception as error:  # foreign input: any class of Transformers may raise anything
        raise AfpqError(f"{model}: Transformers cannot load it: {one_line(error, 300)}") from None
