# SPDX-License-Identifier: MIT
"""examples/lora.py: trains on the demo model, offline, and leaves an adapter that loads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

import afpq
from afpq.demo.run_demo import MODEL

peft = pytest.importorskip("peft", reason="needs PEFT: pip install 'afpq[peft]'")
pytest.importorskip("accelerate", reason="the trainer needs it: pip install 'afpq[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

SCRIPT = Path(__file__).parents[1] / "examples" / "lora.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_lowers_loss_and_perplexity_and_saves_the_adapter(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "MEASURED", 16)
    out = tmp_path / "adapter"
    options = {"--out": out, "--steps": 8, "--batch": 2, "--learning-rate": 5e-3}
    script.main([*(str(part) for pair in options.items() for part in pair), "--gradient-checkpointing"])
    printed = capsys.readouterr().out
    for what in ("training loss", "held-out perplexity"):
        found = re.search(rf"{what} +([\d.]+) -> ([\d.]+)", printed)
        assert found is not None and float(found[2]) < float(found[1])
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, quantization_config=afpq.AfpqConfig(format="nf3")
    )
    loaded = peft.PeftModel.from_pretrained(model, out)
    assert any(p.any() for name, p in loaded.named_parameters() if "lora_B" in name)


def test_windows_held_out_are_not_trained_on(script: ModuleType) -> None:
    training, held_out = script.split(torch.arange(200).view(20, 10))
    assert len(held_out) == 2 and len(training) == 18
    assert sorted([*training.flatten().tolist(), *held_out.flatten().tolist()]) == list(range(200))


@pytest.mark.parametrize("line", [["--text", "nowhere.txt"], ["--out", str(SCRIPT.parent)]])
def test_bad_input_stops_at_once(script: ModuleType, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(line)
    assert caught.value.code == 2 and line[1] in capsys.readouterr().err
