# SPDX-License-Identifier: MIT
"""What gradients tell of a block's linears, against autograd through the whole model at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from families import slow_but_for
from gradient_runs import CPU, WINDOWS, losses, save
from torch import Tensor, nn

import afpq
from afpq.calibration.backward import FloatModelPass
from afpq.calibration.capture import materialize
from afpq.calibration.hidden_states import Activations
from afpq.calibration.output_gradients import gradients_file, output_second_moments, store_gradients
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.reader import open_checkpoint
from afpq.model.skeleton import build_skeleton
from afpq.model.unfuse import unfuse
from afpq.numerics.scheme import parse_scheme
from afpq.recipe import Recipe

SEED = 3


def moments(directory: Path, scratch: Path) -> dict[str, Tensor]:
    """Of all linears, by full names; blocks are run again one by one, as when they are quantized."""
    checkpoint, skeleton = open_checkpoint(directory), build_skeleton(directory)
    plan = make_plan(checkpoint, skeleton, Recipe(parse_scheme("nf4-asym-g32-log8"), "tune"))
    walk = FloatModelPass(plan, skeleton, WINDOWS, scratch, CPU, lambda *_: None)
    walk.forwards()
    inputs = [state.tensor.clone() for state in walk.states]
    walk.keep_gradients(SEED, lambda index: gradients_file(scratch, index))
    found: dict[str, Tensor] = {}
    for index, block in enumerate(walk.blocks):
        stored = {n: p for n, p in plan.names.items() if n.startswith(f"{block.name}.")}
        tensors = {n.removeprefix(f"{block.name}."): checkpoint.read_part(p) for n, p in stored.items()}
        real = materialize(block.module, tensors, CPU)
        store = Activations(scratch / "inputs.bin", tuple(inputs[index].shape), create=True)
        store.tensor.copy_(inputs[index])
        behind = Activations(gradients_file(scratch, index), tuple(store.tensor.shape), create=False)
        names = [name.removeprefix(f"{block.name}.") for name, _ in block.linears()]
        local = output_second_moments(real, walk.calls[block.name], names, store, behind, CPU)
        found |= {f"{block.name}.{name}": G for name, G in local.items()}
    return found


def whole(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The gradients [tokens, out] at the outputs of linears, by autograd through all of the model."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def listen(_m: nn.Module, _args: object, out: Tensor) -> None:
            out.register_hook(lambda g: gradients[name].append(g.flatten(0, -2).clone()))

        return listen

    for name in names:
        model.get_submodule(name).register_forward_hook(hook(name))
    for loss in losses(model, SEED):
        torch.autograd.backward(loss)
    return {name: torch.cat(found) for name, found in gradients.items() if found}


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Mixtral"])
def test_they_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    model = save(family, tmp_path / "model")
    found = moments(tmp_path / "model", tmp_path)
    unfuse(model)
    expected = whole(model, list(found))
    assert len(found) >= 8 and found.keys() == expected.keys()
    for name, G in found.items():
        g = expected[name]
        tokens, width = g.shape
        assert (tokens == WINDOWS.numel()) == ("experts" not in name)
        mean = g.T @ g / tokens
        shrunk = torch.where(torch.eye(width) > 0, mean, mean * tokens / (tokens + width))
        assert torch.allclose(G, shrunk, rtol=1e-2, atol=1e-4 * mean.max().item()), name


def test_gradients_are_stored_once(tmp_path: Path) -> None:
    save("Llama", tmp_path / "model")
    checkpoint, skeleton = open_checkpoint(tmp_path / "model"), build_skeleton(tmp_path / "model")
    plan = make_plan(checkpoint, skeleton, Recipe(parse_scheme("nf4-asym-g32"), "tune"))
    reports: list[str] = []
    walk = FloatModelPass(plan, skeleton, WINDOWS, tmp_path, CPU, lambda text, *_: reports.append(text))
    store_gradients(walk, SEED)
    count = len(reports)
    files = sorted(path.name for path in tmp_path.glob("*.bin"))
    assert files == [f"gradients-{index}.bin" for index in range(len(walk.blocks))] and count > 2
    store_gradients(walk, SEED)
    assert len(reports) == count


QUICK = ("Llama", "GPT-2", "Gemma 2", "Mamba")  # in every run
REFUSED = ("T5", "BART", "BERT, no head")  # they predict no tokens, or have two stacks of blocks


@pytest.mark.parametrize("family", slow_but_for(QUICK, REFUSED))
def test_other_families(tmp_path: Path, family: str) -> None:
    """Every linear that text reaches is solved with gradients, or by GPTQ where they do not reach it, with a note."""
    save(family, tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    settings = afpq.CalibrationSettings(samples=4, seq_len=32)
    text = "The tuned weights of any family. " * 40
    options: Any = {"text": text, "settings": settings, "evaluate": False}
    afpq.quantize(tmp_path / "model", tmp_path / "out", "nf3-asym-g32", method="tune", **options)
    notes = [json.loads(line) for line in (tmp_path / "out" / "afpq_log.jsonl").read_text().splitlines()]
    solved = [note for note in notes if note["method"] == "tune"]
    assert all(note["method"] == "tune" or note["note"] for note in notes)
    assert len(solved) >= 0.5 * len(notes)
    assert sum(n["output_error"] for n in solved) < sum(n["output_error_before"] for n in solved)
