# SPDX-License-Identifier: MIT
"""Fixtures shared by all tests: tiny models made on the spot, and the shared folder where it exists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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


def save_tied_qwen2(directory: Path) -> Any:
    """A random Qwen2ForCausalLM of one block, with biases and tied embeddings; saved, and returned."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    model.save_pretrained(directory)
    return model


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the one weight file of a checkpoint."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes: object) -> None:
    """Change keys of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


PLAIN_PROCESS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not [name for name in sys.modules if name.split(".")[0] == "afpq"]
save_file({"logits": model(torch.arange(0, 240, 5).view(2, 24)).logits.detach()}, sys.argv[2])
"""


def logits_without_afpq(directory: Path, scratch: Path) -> torch.Tensor:
    """What a model gives for `torch.arange(0, 240, 5).view(2, 24)` in a process that never imports afpq."""
    from safetensors.torch import load_file

    command = [sys.executable, "-c", PLAIN_PROCESS, directory, scratch / "logits"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(scratch / "logits")["logits"]


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
