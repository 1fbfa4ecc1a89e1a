# SPDX-License-Identifier: MIT
"""A GGUF file, written by gguf's own writer: names, values and logits as Transformers reads it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import afpq
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import open_checkpoint
from afpq.commands.application import app
from afpq.errors import AfpqError
from afpq.evaluation.inspect_weights import inspect_model
from afpq.evaluation.loading import load_model, load_tokenizer
from afpq.jobs.prepare import CalibrationSettings, prepare
from afpq.model.quantize_in_memory import quantize_model
from afpq.model.tensor_part import TensorPart
from afpq.recipe import Recipe

gguf = pytest.importorskip("gguf")

VOCABULARY = 259
CONFIG = {**TINY, "vocab_size": VOCABULARY, "initializer_range": 0.1}
IDS = torch.arange(30)[None] * 7 % VOCABULARY
SCHEME = "nf4-asym-g32"
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    _, _, block, leaf = stem.split(".", 3)
    return f"blk.{block}.{NAMES[leaf]}.weight"


def permuted(weight: Any, heads: int) -> Any:
    """Rows of queries and keys as llama.cpp keeps them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, kinds: tuple[str, ...] = ("F16", "Q8_0"), extra: tuple[str, ...] = (), **fields: int) -> Path:
    """A random llama; its matrices take the types in turn."""
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(CONFIG["hidden_size"] // CONFIG["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256])
    for key, value in fields.items():
        writer.add_uint16(key.replace("__", "."), value)
    for index, (name, weight) in enumerate(LlamaForCausalLM(LlamaConfig(**CONFIG)).state_dict().items()):
        data = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            data = permuted(data, CONFIG["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        kind = gguf.GGMLQuantizationType[kinds[index % len(kinds)] if data.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, torch.ones(8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def by_transformers(source: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


def test_every_tensor_is_what_transformers_reads(source: Path) -> None:
    checkpoint, model = open_checkpoint(source), by_transformers(source)
    expected = model.state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    kinds = {info.dtype for info in checkpoint.tensors.values()}
    assert kinds == {torch.float32, torch.float16, torch.bfloat16}  # norms, F16, and Q8_0 rounded
    for name, info in checkpoint.tensors.items():
        assert torch.equal(checkpoint.read(name), expected[name].to(info.dtype)), name
    assert checkpoint.published is not None and checkpoint.published.form == "GGUF with tensors in F16, F32, Q8_0"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"] and checkpoint.config["dtype"] == "bfloat16"
    assert torch.allclose(logits(load_model(source, device="cpu")), logits(model), atol=0.05)


def test_quantized_from_a_gguf_as_in_memory(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), "--group-size", "32"])
    assert result.exit_code == 0, result.output
    assert "published as GGUF with tensors in F16, F32, Q8_0" in " ".join(result.output.split())
    model = by_transformers(source)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(open_checkpoint(source).tensors[name].dtype).float()
    quantize_model(model, Recipe(afpq.parse_scheme("nf4-asym-g32-log8")))
    found = logits(load_model(tmp_path / "out", device="cpu"))
    assert torch.allclose(found, logits(model), atol=1e-4)
    assert not torch.allclose(found, logits(by_transformers(source)), atol=0.05)  # it was quantized
    kept = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert kept("A tiny tokenizer").input_ids == own("A tiny tokenizer").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`tiny.gguf` with its weights" in card and "base_model" not in card and "GGUF with tensors" in card


def test_calibrated_measured_inspected_and_described(source: Path, tmp_path: Path) -> None:
    settings = CalibrationSettings(samples=4, seq_len=32)
    afpq.quantize(source, tmp_path / "out", SCHEME, method="gptq", text=TEXT, settings=settings)
    assert "KL divergence from the original" in (tmp_path / "out" / "README.md").read_text()
    assert len(inspect_model(source).layers) == 14
    info = model_info(source)
    assert info.published is not None and info.file_bytes == source.stat().st_size
    assert 8 < info.bits_per_weight < 32
    assert load_tokenizer(source)("a").input_ids


def test_a_stopped_run_goes_on_in_another_process(source: Path) -> None:
    """The fingerprint depends on the file, not on the temporary directory."""
    job = prepare(source, Recipe(afpq.parse_scheme(SCHEME)))
    before = job.fingerprint()
    from afpq.checkpoint import gguf_source

    gguf_source._unpacked.cache_clear()
    after = prepare(source, Recipe(afpq.parse_scheme(SCHEME)))
    assert after.plan.checkpoint.directory != job.plan.checkpoint.directory
    assert after.fingerprint() == before


def test_types_decide_the_dtype(tmp_path: Path) -> None:
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("F32", "float32"), ("Q4_0", "bfloat16")):
        checkpoint = open_checkpoint(write(tmp_path / f"{kind}.gguf", (kind,)))
        assert checkpoint.config["dtype"] == dtype
        assert checkpoint.tensors["lm_head.weight"].dtype == getattr(torch, dtype)


def test_what_transformers_leaves_unread_is_named(tmp_path: Path) -> None:
    found = open_checkpoint(write(tmp_path / "rope.gguf", extra=("rope_freqs.weight",))).published
    assert found is not None and "Transformers does not read its rope_freqs.weight" in found.form
    with pytest.raises(AfpqError, match=r"no name for its tensor blk\.0\.odd\.weight"):
        open_checkpoint(write(tmp_path / "odd.gguf", extra=("blk.0.odd.weight",)))


def test_files_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AfpqError, match="one of 3 parts; merge them first"):
        open_checkpoint(write(tmp_path / "parts.gguf", split__count=3))
    short = tmp_path / "short.gguf"
    short.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(AfpqError, match=r"short\.gguf: Transformers cannot read it"):
        open_checkpoint(short)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(AfpqError, match=r"text\.gguf: Transformers cannot read it"):
        open_checkpoint(tmp_path / "text.gguf")
    with pytest.raises(AfpqError, match=r"give the GGUF file itself: .*tiny\.gguf"):
        open_checkpoint(source.parent)


@pytest.fixture
def no_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)


def test_without_the_package_one_line_names_it(no_gguf: None, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(source.read_bytes())
    with pytest.raises(AfpqError, match=r"pip install gguf"):
        open_checkpoint(other)


MIXTURE = {**CONFIG, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "head_dim": 16}
MIXTURE_NAMES = {
    **NAMES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def write_mixture(path: Path) -> Path:
    """A random Qwen3-MoE, whose experts' gate and up are two tensors of the file and one of the model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_expert_feed_forward_length(768)  # Transformers does not read it; this is its default
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    for name, weight in Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE)).state_dict().items():
        stem = name.removesuffix(".weight")
        leaf = stem.split(".", 3)[-1]
        parts = {OUTSIDE.get(stem) or f"blk.{stem.split('.')[2]}.{MIXTURE_NAMES.get(leaf)}": weight}
        if leaf == "mlp.experts.gate_up_proj":
            halves = zip(("ffn_gate_exps", "ffn_up_exps"), weight.chunk(2, 1))
            parts = {f"blk.{stem.split('.')[2]}.{half}": tensor for half, tensor in halves}
        for part, tensor in parts.items():
            kind = gguf.GGMLQuantizationType["Q8_0" if tensor.ndim == 3 else "F32"]
            data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
            writer.add_tensor(f"{part}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "mixture.gguf")
    checkpoint, expected = open_checkpoint(source), by_transformers(source).state_dict()
    assert checkpoint.tensors.keys() == expected.keys()
    for name, info in checkpoint.tensors.items():
        assert torch.equal(checkpoint.read(name), expected[name].to(info.dtype)), name
    for name in ("gate_up_proj", "down_proj"):
        tensor = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(checkpoint.read_part(TensorPart(tensor, 3)), checkpoint.read(tensor)[3])
    plan = afpq.quantize(source, tmp_path / "out", SCHEME).plan
    assert plan.coverage > 0.999 and len(plan.block_targets) == 2 * (4 + 3 * 4)  # all but the routers
    assert torch.isfinite(logits(load_model(tmp_path / "out", device="cpu"))).all()
