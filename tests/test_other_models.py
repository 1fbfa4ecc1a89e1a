# SPDX-License-Identifier: MIT
"""Models of images and sound, and those with unusual linears: quantized to the end, the same on loading, and told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from command_line import Cli, assert_refused
from command_line import cli as cli  # the fixture
from conftest import save_tokenizer
from families import CHEAP
from torch import Tensor, nn

import afpq
from afpq import AfpqConfig, AfpqError, AfpqLinear
from afpq.checkpoint.info import model_info
from afpq.checkpoint.reader import CARD
from afpq.model.quantize_in_memory import quantize_model

SCHEME = "nf4-asym-g32-log8"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGES = {**SIZES, "image_size": 16, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SOUND = {
    **SIZES, "vocab_size": 32, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    "vocab_size": 256, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
LLAMA4 = {
    **TEXT, "num_key_value_heads": 2, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
    "head_dim": 8, "interleave_moe_layer_step": 1, "no_rope_layers": [1], "attention_chunk_size": 16,
}  # fmt: skip
GEMMA3N = {
    **TEXT, "intermediate_size": [48], "num_key_value_heads": 2, "head_dim": 8, "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8, "layer_types": ["full_attention"],
    "activation_sparsity_pattern": [0.0],
}  # fmt: skip
MUSIC = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}

# Name -> (the model, what the self-test's line holds).
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "ViT": (lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGES)), "on a made-up image"),
    "CLIP": (
        lambda: T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=IMAGES)), "on 16 tokens and a made-up image",
    ),
    "SigLIP": (
        lambda: T.SiglipModel(T.SiglipConfig(text_config=TEXT, vision_config=IMAGES)),
        "on 16 tokens and a made-up image",
    ),
    "Whisper": (
        lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)), "on made-up features of sound",
    ),
    "wav2vec2": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**SOUND)), "on a made-up sound"),
    "MusicGen": (
        lambda: T.MusicgenForCausalLM(T.MusicgenDecoderConfig(**MUSIC)), "does not reach model.decoder.layers.*.enc",
    ),
    "time series": (
        lambda: T.PatchTSTForPrediction(
            T.PatchTSTConfig(d_model=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48)
        ),
        "not compared: the self-test has no input that PatchTSTForPrediction takes",
    ),
    "BERT": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)), "on 16 tokens"),
    "T5's encoder": (
        lambda: T.T5EncoderModel(T.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)),
        "on 16 tokens",
    ),
    "Llama 4": (lambda: T.Llama4ForCausalLM(T.Llama4TextConfig(**LLAMA4)), "on 16 tokens"),
    "Gemma 3n": (lambda: T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**GEMMA3N)), "on 16 tokens"),
}  # fmt: skip
TEXTLESS = ("ViT", "CLIP", "wav2vec2", "MusicGen")

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The directory of a random model; made once."""
    place = tmp_path_factory.mktemp("other")

    def make(name: str) -> Path:
        if not (place / name).exists():
            torch.manual_seed(0)
            MODELS[name][0]().save_pretrained(place / name)
            save_tokenizer(place / name)
        return place / name

    return make


def packed(model: nn.Module) -> dict[str, str]:
    return {name: str(m.scheme) for name, m in model.named_modules() if isinstance(m, AfpqLinear)}


@pytest.mark.parametrize("name", MODELS)
def test_done_with_a_line_that_says_what_was_tested(name: str, original: Make, tmp_path: Path) -> None:
    make, tested = MODELS[name]
    outcome = afpq.quantize(original(name), tmp_path / "out", SCHEME)
    assert tested in outcome.tested and "machine" not in outcome.tested
    assert tested in (tmp_path / "out" / CARD).read_text()
    assert model_info(tmp_path / "out").coverage == pytest.approx(outcome.plan.coverage)
    cls = type(make())
    model = cls.from_pretrained(tmp_path / "out")
    on_load = cls.from_pretrained(original(name), quantization_config=AfpqConfig(format="nf4", group_size=32))
    assert packed(model) == packed(on_load)
    assert packed(model) == {target.module: SCHEME for target in outcome.plan.targets}
    in_memory = quantize_model(cls.from_pretrained(original(name)), outcome.plan.recipe)
    assert packed(in_memory) == packed(model)
    assert sorted(on_load.config.quantization_config.modules_to_not_convert) == sorted(outcome.plan.kept)


def test_heads_that_are_a_list_are_no_blocks(original: Make, tmp_path: Path) -> None:
    plan = afpq.quantize(original("MusicGen"), tmp_path / "out", SCHEME).plan
    assert {f"lm_heads.{i}" for i in range(4)} == set(plan.kept)


@pytest.mark.parametrize("name", TEXTLESS)
@pytest.mark.parametrize("options", [{"method": "gptq"}, {"end_pass": 4}, {"bits_per_weight": 4.3}], ids=str)
def test_what_needs_text_refuses_other_models_before_any_work(
    name: str, options: dict[str, Any], original: Make, tmp_path: Path
) -> None:
    with pytest.raises(AfpqError, match="does not read text"):
        afpq.quantize(original(name), tmp_path / "out", SCHEME, text=CHEAP["text"], **options)
    assert list(tmp_path.iterdir()) == []


def test_a_router_with_a_forward_of_its_own_stays_and_is_named(
    original: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = afpq.quantize(original("Llama 4"), tmp_path / "rtn", SCHEME).plan
    router = "model.layers.0.feed_forward.router"
    assert dict(plan.reasons) == {router: "Llama4Router has a forward of its own"} and router in plan.kept
    assert f"{router.replace('0', '*')} (Llama4Router has a forward of its own)" in (
        (tmp_path / "rtn" / CARD).read_text().replace("\\", "")
    )
    options = {"text": CHEAP["text"], "settings": CHEAP["settings"], "evaluate": False}
    calibrated = afpq.quantize(original("Llama 4"), tmp_path / "gptq", SCHEME, method="gptq", **options).plan
    assert calibrated.targets == plan.targets
    with caplog.at_level(logging.WARNING, "afpq"):
        T.AutoModelForCausalLM.from_pretrained(original("Llama 4"), quantization_config=AfpqConfig())
    assert "Llama4Router has a forward of its own" in caplog.text


CODE = """
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

class Cfg(PretrainedConfig):
    model_type = "my_m"

class Scaled(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x) + x.mean(-1, keepdim=True)

class My(PreTrainedModel):
    config_class = Cfg

    def __init__(self, c):
        super().__init__(c)
        self.emb = nn.Embedding(60, 32)
        kinds = (Scaled, nn.Linear) if c.mixed else (Scaled,)
        self.layers = nn.ModuleList([nn.Sequential(*(kind(32, 32) for kind in kinds)) for _ in range(2)])
        self.head = nn.Linear(32, 60, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.emb

    def forward(self, input_ids=None, **_):
        return CausalLMOutputWithPast(logits=self.head(nn.Sequential(*self.layers)(self.emb(input_ids))))
"""


def save_custom(directory: Path, mixed: bool, code: str = CODE) -> Path:
    """A model of trusted code of its own: scaled linears, and plain ones if `mixed`."""
    directory.mkdir()
    (directory / "my.py").write_text(code)
    auto = '{"AutoConfig": "my.Cfg", "AutoModelForCausalLM": "my.My"}'
    (directory / "config.json").write_text(
        f'{{"architectures": ["My"], "model_type": "my_m", "vocab_size": 60, "mixed": {str(mixed).lower()}, '
        f'"auto_map": {auto}}}'
    )
    config = T.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = T.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(torch.arange(5, 37)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("mixed", [True, False])
def test_a_linear_of_custom_code_keeps_its_forward(mixed: bool, tmp_path: Path) -> None:
    """Also a model that has no other: it is written as it was, and the reason is given."""
    source, out = save_custom(tmp_path / "m", mixed), tmp_path / "out"
    outcome = afpq.quantize(source, out, SCHEME, trust_remote_code=True)
    assert set(outcome.plan.reasons) == {"layers.0.0", "layers.1.0"}
    assert set(outcome.plan.reasons.values()) == {"Scaled has a forward of its own"}
    assert "gave the logits" in outcome.tested and "Scaled has a forward of its own" in (out / CARD).read_text()

    def load(directory: Path, **options: Any) -> Any:
        options |= {"trust_remote_code": True, "dtype": torch.float32}
        return T.AutoModelForCausalLM.from_pretrained(directory, **options).eval()

    model, plain = load(out), load(source)
    assert set(packed(model)) == ({"layers.0.1", "layers.1.1"} if mixed else set())
    for name in packed(model):
        plain.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    assert (logits(model) - logits(plain)).norm() < 1e-5 * logits(plain).norm()
    config = AfpqConfig(format="nf4", group_size=32)
    assert packed(load(source, quantization_config=config)) == packed(model)
    with pytest.raises(AfpqError, match="left to quantize"):
        afpq.quantize(save_custom(tmp_path / "all", True), tmp_path / "none", skip=("layers",), trust_remote_code=True)


def test_the_command_writes_a_model_of_which_nothing_can_be_quantized(cli: Cli, tmp_path: Path) -> None:
    source, out = save_custom(tmp_path / "m", False), tmp_path / "out"
    for words in (["--dry-run"], ["--format", "nf3"]):
        result = cli("quantize", source, out, "--trust-remote-code", *words)
        assert result.code == 0 and "Scaled has a forward of its own" in result.err and "advice" not in result.out


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("method gptq", ["quantize", "{m}", "{o}", "--method", "gptq", "--text", "{t}"]),
        ("a budget of bits", ["quantize", "{m}", "{o}", "--bits-per-weight", "3.5", "--text", "{t}"]),
        ("the end pass", ["quantize", "{m}", "{o}", "--end-pass", "4", "--text", "{t}"]),
        ("an inspection", ["inspect", "{m}"]),
        ("a comparison", ["compare", "{m}", "--schemes", SCHEME, "--text", "{t}", "--report", "{o}"]),
    ],
    ids=["gptq", "budget", "end pass", "inspect", "compare"],
)
def test_what_needs_a_quantized_linear_says_that_there_is_none(
    user: str, words: list[str], cli: Cli, tmp_path: Path
) -> None:
    places = {"m": save_custom(tmp_path / "m", False), "o": tmp_path / "out", "t": tmp_path / "text.txt"}
    save_tokenizer(places["m"])
    places["t"].write_text("some words of text " * 500)
    result = cli(*(word.format(**places) for word in words), "--trust-remote-code")
    assert_refused(result, f"{user} needs a linear that can be quantized")
    assert "Scaled has a forward of its own" in result.err and not places["o"].exists()


def test_the_end_pass_runs_a_model_of_custom_code(cli: Cli, tmp_path: Path) -> None:
    source, text = save_custom(tmp_path / "m", True, CODE.replace("60", "256")), tmp_path / "text.txt"
    save_tokenizer(source)
    text.write_text("some words of text " * 500)
    words = ["--end-pass", "4", "--text", text, "--samples", "4", "--seq-len", "32", "--trust-remote-code"]
    result = cli("quantize", source, tmp_path / "out", "--group-size", "32", *words)
    assert result.code == 0, result
    assert "end_pass" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


TWO_RESULTS = CODE.replace("return 0.5 * super().forward(x) + x.mean(-1, keepdim=True)", "return super().forward(x), x")
TWO_RESULTS = TWO_RESULTS.replace("nn.Sequential(*self.layers)(self.emb(input_ids))", "self.run(self.emb(input_ids))")
TWO_RESULTS += """
    def run(self, x):
        for scaled, linear in self.layers:
            x = linear(scaled(x)[0])
        return x
"""


@pytest.mark.parametrize("code", [CODE, TWO_RESULTS], ids=["another result", "two results"])
def test_the_self_test_sees_a_linear_that_must_not_be_replaced(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rule that leaves such linears, the result is refused by name, and its weights are kept."""
    source = save_custom(tmp_path / "m", True, code)
    with monkeypatch.context() as patched:
        patched.setattr("afpq.model.blocks.why_left", lambda _module: None)
        with pytest.raises(AfpqError, match=r"self-test: layers\.0\.0\.weight.*Scaled"):
            afpq.quantize(source, tmp_path / "out", SCHEME, trust_remote_code=True)
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
