# SPDX-License-Identifier: MIT
"""Benchmarks by lm-evaluation-harness, offline: local tasks, scored by hand too. Most need the extra `eval`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker
from transformers import AutoTokenizer

import afpq
from afpq import AfpqError
from afpq.cli import main
from afpq.evaluation.benchmarks import CODE_SWITCH, TaskOptions, TaskRun, run_tasks
from afpq.evaluation.loading import load_model, load_tokenizer

# The harness' own warnings, and those of the packages it brings, are not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore")
harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="needs lm-eval[hf]: pip install 'afpq[eval]'",
)

QUESTIONS = [
    ("The quick brown fox", ["jumps", "is a number"], 0),
    ("One and one is", ["never", "two"], 1),
    ("A colour:", ["red", "sand in a box"], 0),
    ("She went", ["home", "of"], 0),
    ("Never say", ["the", "never"], 1),
    ("To be or", ["not to be", "x"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
metadata: {{version: 2.0}}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tasks: `choose`, `write`, the group `both`, and `unsafe`, which says that it runs code."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    data.write_text("\n".join(rows), "utf-8")
    for name, rest in {"choose": CHOICE, "write": GENERATE, "unsafe": GENERATE + "unsafe_code: true\n"}.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + rest, "utf-8")
    (folder / "gone.yaml").write_text(TASK.format(name="gone", data="/no/such.jsonl") + CHOICE, "utf-8")
    return folder


@pytest.fixture(scope="module")
def model_dir(make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an end-of-text token, which the harness needs, as nf4-asym-g32."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder / "tiny")
    afpq.quantize(folder / "tiny", folder / "packed", "nf4-asym-g32")
    return folder / "packed"


def accuracy_by_hand(model_dir: Path) -> float:
    """Share of questions whose right answer, after a space, has the largest log-likelihood."""
    model, tokenizer = load_model(model_dir, device="cpu"), load_tokenizer(model_dir)
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            prompt, ids = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


@harness
def test_a_quantized_model_scores_what_a_hand_count_gives(model_dir: Path, tasks: Path) -> None:
    found = run_tasks(model_dir, ["choose"], TaskOptions(tasks, batch_size=3), device="cpu")["choose"]
    expected = accuracy_by_hand(model_dir)
    assert 0 < expected < 1
    assert found.metrics["acc,none"] == pytest.approx(expected)
    assert found.metrics["acc_stderr,none"] > 0
    assert (found.num_fewshot, found.documents, found.version) == (0, 6, "2.0")


@harness
def test_a_model_as_an_object_and_text_that_it_writes(model_dir: Path, tasks: Path) -> None:
    model, tokenizer = load_model(model_dir, device="cpu"), load_tokenizer(model_dir)
    before = (tokenizer.pad_token, len(tokenizer))
    found = run_tasks(model, ["choose", "write"], TaskOptions(tasks, limit=4, num_fewshot=2), tokenizer=tokenizer)
    assert set(found) == {"choose", "write"}
    assert (found["write"].documents, found["write"].num_fewshot) == (4, 2)
    assert "exact_match,none" in found["write"].metrics
    assert (tokenizer.pad_token, len(tokenizer)) == before
    with pytest.raises(AfpqError, match="tokenizer"):
        run_tasks(model, ["choose"], TaskOptions(tasks))


@harness
def test_code_runs_only_where_it_was_allowed(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "1"):  # the variable alone, perhaps set for something else, is no permission
        monkeypatch.delenv(CODE_SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(CODE_SWITCH, value)
        with pytest.raises(AfpqError, match=r"task unsafe: .*--allow-code-execution"):
            TaskRun(["unsafe"], TaskOptions(tasks))
        assert len(TaskRun(["unsafe"], TaskOptions(tasks, allow_code_execution=True)).objects) == 1
        assert os.environ.get(CODE_SWITCH) == value


@harness
def test_tasks_that_cannot_be_had(tasks: Path) -> None:
    with pytest.raises(AfpqError, match=r"task 'hellaswagg' is not known .*did you mean hellaswag.*lm-eval ls tasks"):
        TaskRun(["hellaswagg"])
    with pytest.raises(AfpqError, match="task gone: lm-eval stopped: FileNotFoundError") as error:
        TaskRun(["gone"], TaskOptions(tasks))
    assert error.value.__cause__ is not None
    with pytest.raises(AfpqError, match=r"task humaneval: .*--allow-code-execution"):
        TaskRun(["humaneval"])


@harness
def test_a_tokenizer_without_special_tokens(tiny_model_dir: Path, tasks: Path) -> None:
    with pytest.raises(AfpqError, match="begins or ends a text"):
        run_tasks(tiny_model_dir, ["choose"], TaskOptions(tasks))


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -1}, {"batch_size": 0}, {"num_fewshot": -1}])
def test_numbers_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(AfpqError, match="at least"):
        TaskOptions(**options)


# ---- the command


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """Run `afpq eval ARGUMENTS` in this process: (exit code, what it printed)."""
    monkeypatch.setattr(sys, "argv", ["afpq", "eval", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0), capsys.readouterr()
    return 0, capsys.readouterr()


@harness
def test_eval_merges_text_and_tasks(
    model_dir: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 9)
    local = ("--tasks", "choose,write", "--include-path", tasks, "--json", tmp_path / "e.json", "--device", "cpu")
    code, printed = call(monkeypatch, capsys, model_dir, *local, "--text", tmp_path / "text.txt", "--limit", 4)
    assert (code, printed.err) == (0, "")
    assert "perplexity" in printed.out and "choose" in printed.out and "first 4 documents" in printed.out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["perplexity"] > 1 and found["tasks"]["choose"]["documents"] == 4

    code, printed = call(monkeypatch, capsys, model_dir, *local)
    assert (code, printed.err) == (0, "")
    found = json.loads((tmp_path / "e.json").read_text())
    assert set(found) == {"tasks"} and set(found["tasks"]) == {"choose", "write"}
    assert found["tasks"]["choose"]["metrics"]["acc,none"] == pytest.approx(accuracy_by_hand(model_dir))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "x", "--reference", "MODEL"], "--reference needs text"),
        (["--limit", "3", "--text", __file__], "for --tasks"),
        (["--tasks", "x", "--include-path", "/no/such/dir"], "/no/such/dir"),
        (["--tasks", "x", "--limit", "0"], "at least"),
        (["--tasks", "x", "--device", "abacus"], "abacus"),
        (["--text", __file__, "--device", "abacus"], "abacus"),
        (["--tasks", "hellaswag"], "pip install 'afpq[eval]'"),
    ],
)
def test_bad_options(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    code, printed = call(monkeypatch, capsys, tiny_model_dir, *arguments)
    assert (code, printed.out) == (2, "")
    assert re.fullmatch(r"afpq: [^\n]+\n", printed.err) and words in printed.err
