# SPDX-License-Identifier: MIT
"""Lines before the work: tensors that the architecture does not have, and coverage by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import Cli, read_json
from command_line import cli as cli  # the fixture
from conftest import ModelMaker, edit_weights

from afpq import Recipe, parse_scheme, quantize
from afpq.checkpoint.info import model_info
from afpq.jobs.notices import notices
from afpq.jobs.prepare import prepare

RECIPE = Recipe(parse_scheme("nf4-asym-g64"))


def add_a_block(directory: Path) -> None:
    """As the layer for speculation in DeepSeek-V3's files, which Transformers drops."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        extra = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
        tensors.update(extra)

    edit_weights(directory, change)


def test_a_block_that_the_model_does_not_use(cli: Cli, tiny_copy: Path, tmp_path: Path) -> None:
    add_a_block(tiny_copy)
    (line,) = notices(prepare(tiny_copy, RECIPE))
    assert line == (
        "9 tensors of the file are not part of LlamaForCausalLM and are copied as they are: model.layers.2.*"
    )
    dry = cli("quantize", tiny_copy, tmp_path / "out", "--dry-run")
    done = cli("quantize", tiny_copy, tmp_path / "out", "--json", tmp_path / "q.json")
    info = cli("info", tmp_path / "out", "--json", tmp_path / "i.json")
    assert f"note: {line}\n" in dry.err and f"note: {line}\n" in done.err
    made, known = read_json(tmp_path / "q.json"), read_json(tmp_path / "i.json")
    assert made["coverage"] == known["coverage"] == pytest.approx(2 / 3)
    assert made["left"] == known["left"] and "66.7 %" in done.out and "66.67 %" in info.out


def test_the_line_comes_before_the_work(tiny_copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_a_block(tiny_copy)
    seen: list[int] = []
    with caplog.at_level("WARNING", "afpq"):
        quantize(tiny_copy, tmp_path / "out", progress=lambda *_: seen.append(len(caplog.records)))
    assert seen and min(seen) == 1 and "9 tensors of the file" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["mtp.extra.weight"], ["1 tensor of the file is not part of", "copied as it is: mtp.extra.weight"]),
        ([f"model.layers.{i}.attn.masked_bias" for i in range(2)], ["2 tensors", "model.layers.*.attn.masked_bias"]),
        ([f"extra{i}.weight" for i in range(9)], ["9 tensors", "extra5.weight and 3 more"]),
    ],
    ids=["one", "a kind", "many kinds"],
)
def test_tensors_are_named_by_kind(tiny_copy: Path, names: list[str], words: list[str]) -> None:
    edit_weights(tiny_copy, lambda tensors: tensors.update({name: torch.zeros(3, 5) for name in names}))
    (line,) = notices(prepare(tiny_copy, RECIPE))
    assert all(word in line for word in words), line


def test_a_usual_checkpoint_has_no_line(tiny_model_dir: Path, make_model: ModelMaker, tmp_path: Path) -> None:
    assert notices(prepare(tiny_model_dir, RECIPE)) == []
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    edit_weights(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert notices(prepare(tied, RECIPE)) == []


@pytest.mark.parametrize("skip", [(), ("mlp",), (r"layers\.0\.",)], ids=str)
def test_both_commands_count_alike(tiny_copy: Path, tmp_path: Path, skip: tuple[str, ...]) -> None:
    edit_weights(
        tiny_copy, lambda t: t.update({"towers.3.weight": torch.zeros(32, 64), "vision.proj": torch.ones(9, 9)})
    )
    plan = quantize(tiny_copy, tmp_path / "out", skip=skip).plan
    info = model_info(tmp_path / "out")
    assert info.coverage == pytest.approx(plan.coverage, rel=1e-12)
    assert sum(info.left.values()) == sum(plan.left.values()) >= 32 * 64
