# SPDX-License-Identifier: MIT
"""The self-test: passes what is right, names what is not, and nothing that fails it gets a name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import afpq
from afpq import AfpqError, Recipe, parse_scheme, quantize
from afpq.checkpoint.plan import Plan
from afpq.checkpoint.reader import CARD, WEIGHTS, Checkpoint, open_checkpoint
from afpq.checkpoint.verify import check_tensors, digest
from afpq.checkpoint.writer import ShardWriter
from afpq.evaluation.loading import load_model
from afpq.jobs.prepare import prepare
from afpq.jobs.selftest import check_reloaded
from afpq.kernels import set_compute
from afpq.model.linear import AfpqLinear

SCHEME = "nf3-asym-g64"
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def plan(tiny_model_dir: Path) -> Plan:
    return prepare(tiny_model_dir, Recipe(parse_scheme(SCHEME))).plan


@pytest.fixture
def out(tiny_model_dir: Path, tmp_path: Path) -> Path:
    quantize(tiny_model_dir, tmp_path / "out", SCHEME)
    return tmp_path / "out"


def digests_of(directory: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in load_file(directory / WEIGHTS).items()}


def skeleton(model: Path) -> Any:
    return prepare(model, Recipe(parse_scheme(SCHEME))).model


def test_what_is_right_passes(out: Path, plan: Plan, tiny_model_dir: Path) -> None:
    written = open_checkpoint(out)
    check_tensors(written, plan.outputs(), digests_of(out))
    assert "gave the logits" in check_reloaded(written, plan, skeleton(tiny_model_dir), digests_of(out))


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"format": "fp3"}, "fp3-asym-g64"),
        ({"modules_to_not_convert": ["lm_head", UP]}, UP),
    ],
)
def test_a_config_that_tells_another_story(
    out: Path, plan: Plan, tiny_model_dir: Path, keys: dict[str, Any], word: str
) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= keys
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(AfpqError, match=word):
        check_reloaded(open_checkpoint(out), plan, skeleton(tiny_model_dir), digests_of(out))


def test_a_kernel_that_is_wrong_is_caught(
    out: Path, plan: Plan, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AfpqLinear.forward
    wrong = lambda self, x: right(self, x) * (1.01 if self.in_features == 96 else 1)  # noqa: E731
    monkeypatch.setattr(AfpqLinear, "forward", wrong)
    with pytest.raises(AfpqError, match=r"down_proj\.weight: the loaded layer's outputs differ"):
        check_reloaded(open_checkpoint(out), plan, skeleton(tiny_model_dir), digests_of(out))


def test_a_model_that_cannot_run_here_is_told_not_refused(
    out: Path, plan: Plan, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs a GPU")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", broken)
    said = check_reloaded(open_checkpoint(out), plan, skeleton(tiny_model_dir), digests_of(out))
    assert "not compared" in said and "RuntimeError: needs a GPU" in said and "machine" not in said


def test_the_chosen_arithmetic_is_kept(out: Path, plan: Plan, tiny_model_dir: Path) -> None:
    set_compute("int8")
    try:
        assert "gave the logits" in check_reloaded(
            open_checkpoint(out), plan, skeleton(tiny_model_dir), digests_of(out)
        )
    finally:
        assert set_compute("exact") == "int8"


def test_without_memory_to_spare_nothing_is_loaded_whole(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any) -> None:
        raise AssertionError("was loaded")

    monkeypatch.setattr("afpq.jobs.selftest.available_memory", lambda: 0)
    monkeypatch.setattr("afpq.jobs.selftest.load_model", loaded)
    quantize(tiny_model_dir, tmp_path / "out")
    assert "was not loaded whole" in (tmp_path / "out" / CARD).read_text()


# ---- inside a run


def test_a_disk_that_writes_something_else(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is published and nothing is kept: it would only fail again."""
    write = ShardWriter.write

    def flip(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        write(writer, name, tensor ^ 1 if name == f"{UP}.qweight" else tensor)

    monkeypatch.setattr(ShardWriter, "write", flip)
    with pytest.raises(AfpqError, match=rf"self-test: tensor {UP}\.qweight"):
        quantize(tiny_model_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_changed_while_a_run_was_stopped(tiny_model_dir: Path, tmp_path: Path) -> None:
    def stop(unit: str, _done: int, _total: int) -> None:
        if unit.startswith("model.layers.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model_dir, tmp_path / "out", progress=stop)
    file = tmp_path / "out.partial" / WEIGHTS
    place = int.from_bytes(file.read_bytes()[:8], "little") + 8  # the first byte of the first tensor
    with open(file, "r+b") as opened:
        opened.seek(place)
        opened.write(bytes([file.read_bytes()[place] ^ 255]))
    with pytest.raises(AfpqError, match=r"self-test: tensor .*--no-resume"):
        quantize(tiny_model_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial" / "config.json").exists()
    quantize(tiny_model_dir, tmp_path / "out", resume=False)
    assert (tmp_path / "out" / CARD).exists()


def test_what_does_not_load_keeps_its_weights_for_another_try(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AfpqError("Transformers cannot load it")

    with monkeypatch.context() as patched:
        patched.setattr("afpq.jobs.selftest.load_model", refuse)
        with pytest.raises(AfpqError, match="cannot load it"):
            quantize(tiny_model_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list(tmp_path.rglob("config.json"))
    units: list[str] = []
    afpq.quantize(tiny_model_dir, tmp_path / "out", progress=lambda unit, *_: units.append(unit))
    assert units == [] and (tmp_path / "out" / "config.json").exists()


def test_every_tensor_is_read_once(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is compared with the checksums there are, and not with another reading of the files."""
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def counted(self: Checkpoint, name: str, *rest: Any) -> Tensor:
        if self.directory != tiny_model_dir:
            reads[name] += 1
        return read(self, name, *rest)

    monkeypatch.setattr(Checkpoint, "read", counted)
    outcome = quantize(tiny_model_dir, tmp_path / "out", SCHEME)
    assert "gave the logits" in outcome.tested
    assert reads == dict.fromkeys(open_checkpoint(tmp_path / "out").tensors, 1)


def test_a_tensor_that_changes_while_it_is_loaded(
    out: Path, plan: Plan, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*arguments: Any) -> Any:
        model = load_model(*arguments)
        model.model.norm.weight.data[3] += 1
        return model

    monkeypatch.setattr("afpq.jobs.selftest.load_model", changed)
    with pytest.raises(AfpqError, match=r"tensor model\.norm\.weight is not in the loaded model"):
        check_reloaded(open_checkpoint(out), plan, skeleton(tiny_model_dir), digests_of(out))


def test_a_result_that_fails_where_the_original_runs_is_refused_and_kept(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(layer: AfpqLinear, _x: Tensor) -> Tensor:
        raise TypeError(f"no {layer.in_features}")

    with monkeypatch.context() as patched:
        patched.setattr(AfpqLinear, "forward", failing)
        with pytest.raises(AfpqError, match=r"self-test: .*cannot run.*TypeError: no 64"):
            quantize(tiny_model_dir, tmp_path / "out", SCHEME)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    units: list[str] = []
    quantize(tiny_model_dir, tmp_path / "out", SCHEME, progress=lambda unit, *_: units.append(unit))
    assert units == [] and (tmp_path / "out" / "config.json").exists()
