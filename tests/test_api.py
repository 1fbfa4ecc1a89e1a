# SPDX-License-Identifier: MIT
"""`afpq.quantize` from a directory to a directory: exact, complete, small, and frugal with memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ModelMaker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from afpq import AfpqError, AfpqLinear, Recipe, parse_scheme, quantize
from afpq.checkpoint.checksums import CHECKSUMS
from afpq.checkpoint.reader import CARD, WEIGHTS
from afpq.checkpoint.unaware_loaders import GUARD, GUARD_KEY
from afpq.jobs.finish_directory import LOG_NAME
from afpq.jobs.prepare import prepare
from afpq.jobs.quality_card import PICTURE
from afpq.model.quantize_in_memory import quantize_model

IDS = torch.arange(0, 240, 5).view(2, 24)
PARTS = (".qweight", ".scales", ".scales_pos", ".scales_neg", ".zeros")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits  # type: ignore[no-any-return]


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)  # type: ignore[no-any-return]


def quantized_in_memory(directory: Path, recipe: Recipe) -> nn.Module:
    return quantize_model(load(directory), recipe)


@pytest.mark.parametrize(
    "scheme",
    ["nf4-asym-g128", "nf3-asym-g64", "nf3-sym-g32", "fp4-asym-g-1", "int4-asym-g32", "int3-asym-g128", "int8-sym-g64"],
)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_the_result_equals_the_model_quantized_in_memory(
    tiny_model_dir: Path, tmp_path: Path, scheme: str, search: str
) -> None:
    quantize(tiny_model_dir, tmp_path / "out", scheme, scale_search=search)
    expected = quantized_in_memory(tiny_model_dir, Recipe(parse_scheme(scheme), scale_search=search))
    assert torch.equal(logits(load(tmp_path / "out")), logits(expected))


def test_the_result_is_near_the_original(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out", "int8-asym-g32")
    original, rounded = logits(load(tiny_model_dir)), logits(load(tmp_path / "out"))
    assert not torch.equal(original, rounded)
    assert (original - rounded).norm() < 0.02 * original.norm()


@pytest.fixture(scope="module")
def round_model(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All dimensions are multiples of 128, so that no group is short."""
    return make_model(tmp_path_factory.mktemp("round") / "model", hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("nf3-asym-g128", 3 + 32 / 128),
        ("nf4-asym-g128", 4 + 32 / 128),
        ("nf3-sym-g128", 3 + 16 / 128),
        ("nf4-sym-g128", 4 + 16 / 128),
        ("int4-asym-g128", 4 + (16 + 4) / 128),
        ("int3-asym-g64", 3 + (16 + 3) / 64),
        ("nf2-asym-g64", 2 + 32 / 64),
        ("int8-sym-g32", 8 + 16 / 32),
    ],
)
def test_true_bits_counted_on_disk(round_model: Path, tmp_path: Path, scheme: str, bits: float) -> None:
    plan = quantize(round_model, tmp_path / "out", scheme).plan
    stored = load_file(tmp_path / "out" / WEIGHTS)
    originals = load_file(round_model / WEIGHTS)
    packed = {name: tensor for name, tensor in stored.items() if name.endswith(PARTS)}
    replaced = [tensor for name, tensor in originals.items() if name not in stored]
    weights = sum(tensor.numel() for tensor in replaced)
    assert len(replaced) == 14
    assert 8 * sum(tensor.nbytes for tensor in packed.values()) / weights == bits
    assert plan.bits_per_weight == bits
    # and the file holds nothing else: header aside, it is as long as its tensors
    tensors = sum(tensor.nbytes for tensor in stored.values())
    assert 0 <= (tmp_path / "out" / WEIGHTS).stat().st_size - tensors < 200 * len(stored)


def test_the_directory_is_complete(tiny_copy: Path, tmp_path: Path) -> None:
    (tiny_copy / "LICENSE").write_text("free")
    (tiny_copy / "LICENSES").mkdir()
    (tiny_copy / "chat_template.jinja").write_text("{{ messages }}")
    before = {path.name: path.read_bytes() for path in tiny_copy.iterdir() if path.is_file()}
    quantize(tiny_copy, tmp_path / "out", "nf4-asym-g64")
    for name in set(before) - {WEIGHTS, "config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*before, LOG_NAME, CARD, PICTURE, CHECKSUMS}
    assert {path.name: path.read_bytes() for path in tiny_copy.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_config_tells_the_recipe_and_keeps_the_rest(tiny_model_dir: Path, tmp_path: Path) -> None:
    quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64")
    before, after = (json.loads((d / "config.json").read_text()) for d in (tiny_model_dir, tmp_path / "out"))
    keys = after.pop("quantization_config")
    assert after.pop(GUARD_KEY) == GUARD and after == before
    expected = {"quant_method": "afpq", "version": 1, "bits": 3, "format": "nf3", "group_size": 64, "sym": False}
    assert expected.items() <= keys.items()
    assert (keys["method"], keys["modules_to_not_convert"]) == ("rtn", ["lm_head"])


def test_the_log_has_a_line_for_every_linear(tiny_model_dir: Path, tmp_path: Path) -> None:
    plan = quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64", skip=("gate",)).plan
    entries = [json.loads(line) for line in (tmp_path / "out" / LOG_NAME).read_text().splitlines()]
    assert [entry["module"] for entry in entries] == [target.module for target in plan.targets]
    assert len(entries) == 12
    assert all(0 < entry["weight_error"] < 0.1 for entry in entries)


def test_progress_ends_at_all_weights(tiny_model_dir: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    quantize(tiny_model_dir, tmp_path / "out", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    total = sum(tensor.numel() for tensor in load_file(tiny_model_dir / WEIGHTS).values())
    assert done == sorted(done) and done[-1] == total
    assert {call[2] for call in calls} == {total}
    assert calls[-1][0].startswith("model.layers.1")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unusable_weight_is_named_and_nothing_stays(tiny_copy: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tiny_copy / WEIGHTS)
    tensors[name][7, 9] = value
    save_file(tensors, tiny_copy / WEIGHTS, {"format": "pt"})
    with pytest.raises(AfpqError, match=f"{name}.*NaN or Inf".replace(".", r"\.", 3)):
        quantize(tiny_copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_stopped_run_looks_unfinished_and_goes_on(tiny_model_dir: Path, tmp_path: Path, finished: int) -> None:
    calls: list[str] = []

    def stop(unit: str, done: int, total: int) -> None:
        calls.append(unit)
        if len(calls) == finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64", progress=stop)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/config.json"))
    quantize(tiny_model_dir, tmp_path / "out", "nf3-asym-g64")
    quantize(tiny_model_dir, tmp_path / "straight", "nf3-asym-g64")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]
    for name in (WEIGHTS, "config.json", CARD, PICTURE):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "straight").iterdir()
    }


def test_an_existing_output_is_left_alone(tiny_model_dir: Path, tiny_copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in tiny_copy.iterdir()}
    with pytest.raises(AfpqError, match="exists already"):
        quantize(tiny_model_dir, tiny_copy)
    with pytest.raises(AfpqError, match="exists already"):
        quantize(tiny_copy, tiny_copy)
    assert {path.name: path.read_bytes() for path in tiny_copy.iterdir()} == before


def test_skip_and_overrides_hold_after_loading(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = parse_scheme("int8-sym-g32")
    overrides = ((r"layers\.0\..*down_proj$", other), ("o_proj", parse_scheme("nf3-asym-g64")))
    quantize(tiny_model_dir, tmp_path / "out", "nf4-asym-g64", skip=(r"\.1\.self_attn\.o_proj",), overrides=overrides)
    model = load(tmp_path / "out")
    kinds = {
        name: str(module.scheme) if isinstance(module, AfpqLinear) else "plain"
        for name, module in model.named_modules()
        if isinstance(module, AfpqLinear | nn.Linear)
    }
    assert len(kinds) == 15
    special = {
        "lm_head": "plain",
        "model.layers.1.self_attn.o_proj": "plain",
        "model.layers.0.self_attn.o_proj": "nf3-asym-g64",
        "model.layers.0.mlp.down_proj": "int8-sym-g32",
    }
    assert {name: kind for name, kind in kinds.items() if kind != "nf4-asym-g64"} == special
    recipe = Recipe(parse_scheme("nf4-asym-g64"), skip=(r"\.1\.self_attn\.o_proj",), overrides=overrides)
    assert torch.equal(logits(model), logits(quantized_in_memory(tiny_model_dir, recipe)))


def test_sharded_input_gives_the_same_output(make_model: ModelMaker, tiny_model_dir: Path, tmp_path: Path) -> None:
    sharded = make_model(tmp_path / "sharded", max_shard_size="60KB")
    quantize(sharded, tmp_path / "a", "nf3-asym-g64")
    quantize(tiny_model_dir, tmp_path / "b", "nf3-asym-g64")
    assert not list((tmp_path / "a").glob("*.index.json"))
    one, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_two_runs_write_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(tiny_model_dir, tmp_path / name, "nf3-asym-g64", scale_search="mse")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tied_embeddings_stay_tied(make_model: ModelMaker, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", tie_word_embeddings=True)
    quantize(directory, tmp_path / "out", "nf4-asym-g64")
    model = load(tmp_path / "out")
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight
    assert torch.equal(logits(model), logits(quantized_in_memory(directory, Recipe(parse_scheme("nf4-asym-g64")))))


def test_biases_are_kept(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, tie_word_embeddings=False,
    )  # fmt: skip
    original = Qwen2ForCausalLM(config)
    for name, parameter in original.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    original.save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", "nf4-asym-g64")
    recipe = Recipe(parse_scheme("nf4-asym-g64"))
    assert torch.equal(logits(load(tmp_path / "out")), logits(quantize_model(original, recipe)))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"scheme": "nf5-asym-g64"}, "nf5"),
        ({"scheme": "nf4"}, "nf4"),
        ({"scheme": "nf4-asym-g0"}, "0"),
        ({"method": "magic"}, "magic"),
        ({"scale_search": "luck"}, "luck"),
        ({"skip": ("(",)}, "regular expression"),
        ({"skip": (".",)}, "skip"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(tiny_model_dir: Path, tmp_path: Path, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(AfpqError, match=word):
        quantize(tiny_model_dir, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_planning_writes_nothing(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = prepare(tiny_model_dir, Recipe(parse_scheme("nf4-asym-g64")))
    assert len(job.plan.targets) == 14
    assert list(tmp_path.iterdir()) == []


def test_remote_code_travels_with_the_model(tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    (tiny_copy / "custom.py").write_text(
        f"{code}\nclass MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "\nclass MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    config = json.loads((tiny_copy / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "custom.MyConfig", "AutoModelForCausalLM": "custom.MyModel"}
    (tiny_copy / "config.json").write_text(json.dumps(config))
    quantize(tiny_copy, tmp_path / "out", "nf4-asym-g64", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    assert type(model).__name__ == "MyModel"
    assert isinstance(model.model.layers[0].mlp.up_proj, AfpqLinear)


MEASURE = """
import re, sys
from pathlib import Path
import afpq
from afpq.jobs import selftest
from afpq.checkpoint.reader import Checkpoint

selftest.available_memory = lambda: 0  # no memory to spare: nothing may be loaded whole
samples, read = [], Checkpoint.read

def sampled(checkpoint, name):
    samples.append(int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
    return read(checkpoint, name)

Checkpoint.read = sampled
warm, model, out = map(Path, sys.argv[1:])
afpq.quantize(warm, out / "warm")
before = samples[-1]
samples.clear()
afpq.quantize(model, out / "model")
print(max(samples), max(samples) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux does")
def test_memory_does_not_grow_with_the_number_of_blocks(make_model: ModelMaker, tmp_path: Path) -> None:
    """Private memory, asked for before each tensor: resident memory also tells what else the machine is doing."""
    sizes, peaks, growth = {}, {}, {}
    for blocks in (1, 8, 32):
        directory = make_model(
            tmp_path / f"model{blocks}", num_hidden_layers=blocks, hidden_size=256, intermediate_size=512
        )
        sizes[blocks] = (directory / WEIGHTS).stat().st_size
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system
    for blocks in (8, 32):
        arguments = [str(tmp_path / "model1"), str(tmp_path / f"model{blocks}"), str(tmp_path / f"out{blocks}")]
        command = [sys.executable, "-c", MEASURE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[blocks], growth[blocks] = map(int, done.stdout.split())
    assert peaks[32] <= 1.1 * peaks[8]
    assert growth[32] - growth[8] < 0.25 * (sizes[32] - sizes[8])
