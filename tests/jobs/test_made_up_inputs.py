# SPDX-License-Identifier: MIT
"""What is made up for a model has the names, shapes and range that its config states."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as T
from small_models import bert, llama, t5

from afpq.jobs.made_up_inputs import WINDOW_TOKENS, made_up_inputs

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES = {**SIZES, "image_size": [16, 24], "patch_size": 8, "num_channels": 1}


def kinds(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Words -> names -> shapes."""
    return {words: {n: tuple(t.shape) for n, t in values.items()} for words, values in made_up_inputs(model)}


@pytest.mark.parametrize("model", [llama(False), bert()], ids=["decoder", "encoder"])
def test_a_model_of_text_gets_tokens_first_and_all_of_its_vocabulary(model: Any) -> None:
    words, inputs = next(made_up_inputs(model))
    assert words == f"{WINDOW_TOKENS} tokens" and list(inputs) == ["input_ids"]
    assert inputs["input_ids"].shape == (1, WINDOW_TOKENS)
    assert inputs["input_ids"].min() >= 0 and inputs["input_ids"].max() < 256


def test_an_encoder_decoder_gets_tokens_for_both() -> None:
    _, inputs = next(made_up_inputs(t5()))
    assert set(inputs) == {"input_ids", "decoder_input_ids"}


def test_a_model_of_images_gets_an_image_and_no_tokens() -> None:
    found = kinds(T.ViTModel(T.ViTConfig(**IMAGES)))
    assert found["a made-up image"] == {"pixel_values": (1, 1, 16, 24)}
    assert not any("tokens" in words for words in found)


def test_a_model_of_both_is_tried_with_each_and_with_both() -> None:
    text = {**SIZES, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    found = kinds(T.CLIPModel(T.CLIPConfig(text_config=text, vision_config={**IMAGES, "image_size": 16})))
    tokens, image = (1, WINDOW_TOKENS), (1, 1, 16, 16)
    assert found["16 tokens and a made-up image"] == {"input_ids": tokens, "pixel_values": image}
    assert next(iter(found)) == "16 tokens"


def test_music_has_a_row_of_tokens_for_each_stream() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    _, inputs = next(made_up_inputs(T.MusicgenForCausalLM(T.MusicgenDecoderConfig(**sizes, num_codebooks=3))))
    assert inputs["input_ids"].shape == (3, WINDOW_TOKENS)
