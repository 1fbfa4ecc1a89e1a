# SPDX-License-Identifier: MIT
"""Text as it is generated: the pieces are the text, whatever bytes tokens are cut at; limits and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from afpq.errors import AfpqError
from afpq.evaluation.generation import Sampling, _Pieces, generate_text, prompt_inputs, stream
from afpq.evaluation.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load_model(tiny_model_dir, device="cpu"), load_tokenizer(tiny_model_dir)


def bert() -> Any:
    return BertModel(BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def test_generation_is_the_prompt_and_its_greedy_continuation(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = generate_text(model, tokenizer, "Once", 1)
    with torch.no_grad():
        following = model(torch.tensor([tokenizer("Once")["input_ids"]])).logits[0, -1].argmax()
    assert text == tokenizer.decode([*tokenizer("Once")["input_ids"], int(following)])
    with pytest.raises(AfpqError, match="the prompt is empty"):
        generate_text(model, tokenizer, "", 1)
    with pytest.raises(AfpqError, match="BertModel does not write text"):
        generate_text(bert(), tokenizer, "Once", 1)


@settings(deadline=None)
@given(st.text(), st.data())
def test_pieces_are_the_text(loaded: tuple[Any, Any], text: str, data: st.DataObject) -> None:
    """Tokens are bytes here: characters of several bytes come in parts, and never as half of one."""
    tokenizer = loaded[1]
    ids, pieces = tokenizer(text)["input_ids"], []
    streamed = _Pieces(tokenizer, pieces.append, skip_prompt=False)
    at = data.draw(st.integers(0, len(ids)))
    streamed.put(torch.tensor([ids[:at]], dtype=torch.int64))
    for token in ids[at:]:
        streamed.put(torch.tensor([token]))
    streamed.end()
    assert "".join(pieces) == streamed.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_may_not_fill_the_context(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    with pytest.raises(AfpqError, match=f"{context} tokens, and the model's context {context}"):
        generate_text(model, tokenizer, "a" * context, 1)
    almost = generate_text(model, tokenizer, "a" * (context - 2), 99)
    assert len(tokenizer(almost)["input_ids"]) >= context - 2


def test_the_prompt_can_be_left_out(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    inputs = prompt_inputs(tokenizer, "Once")
    whole = stream(model, tokenizer, inputs, 8, Sampling(), lambda _: None)
    assert whole == "Once" + stream(model, tokenizer, inputs, 8, Sampling(), lambda _: None, skip_prompt=True)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((-0.1, None, None), "temperature"),
        ((float("inf"), None, None), "temperature"),
        ((1.0, 0.0, None), "top-p"),
        ((1.0, 1.1, None), "top-p"),
        ((1.0, None, -1), "seed"),
        ((1.0, None, 2**63), "seed"),
        ((0.0, 0.5, None), "no effect"),
        ((0.0, None, 5), "no effect"),
    ],
)
def test_bad_sampling(values: tuple[float, float | None, int | None], word: str) -> None:
    with pytest.raises(AfpqError, match=word):
        Sampling(*values)
