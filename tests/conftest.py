# SPDX-License-Identifier: MIT
"""Fixtures shared by all tests: tiny models made on the spot, and the shared folder where it exists."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# Set before anything imports these libraries, which read it once; children inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other on a busy machine

import torch  # noqa: E402 (its threads read the variable above)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # GPU kernels run on CPU tensors; read when Triton is first imported

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,  # no multiple of 64: the last group of down_proj is short
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}

ModelMaker = Callable[..., Path]


def save_llama(directory: Path, seed: int = 0, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """A random float16 LlamaForCausalLM with a byte-level tokenizer in `directory`; `changes` to the tiny config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "initializer_range": 0.05, **changes}))
    model.to(torch.float16).save_pretrained(directory, max_shard_size=max_shard_size)
    save_tokenizer(directory)
    return directory


def save_tokenizer(directory: Path) -> None:
    """A tokenizer with one token for each byte, which therefore reads any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """`make_model(directory, seed=0, max_shard_size="1GB", **config)`: see `save_llama`."""
    return save_llama


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, for tests that only read it."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, for tests that break it."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where GPU kernels run: the GPU, or else CPU tensors in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def shared() -> Path:
    """The shared material beside the repository; the test is skipped where it does not exist."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared folder")
    return folder
