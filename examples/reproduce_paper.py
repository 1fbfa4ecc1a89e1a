# SPDX-License-Identifier: MIT
"""The tables of the AFPQ paper (arXiv 2311.01792), each by one command, the paper's numbers beside ours.

    python examples/reproduce_paper.py --table 2 --model meta-llama/Llama-2-7b-hf --out paper

Tables 1, 2, 7, 8 round to nearest, 3 is GPTQ, 4 is AWQ; 5 needs WizardCoder or MetaMath and afpq[eval]; 6 is latency,
for which this only says what to run. Every cell is one quantized model, measured and deleted again; its figures stay in
OUT/cells, and the same command goes on from there. What differs from the paper is in docs/paper.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import afpq
from afpq.evaluation.loading import load_model, load_tokenizer, quiet_transformers, window_length
from afpq.evaluation.perplexity import evaluate, logits_of
from afpq.evaluation.tables import table as markdown
from afpq.evaluation.text import read_text, tokenize, windows

PAPER: dict[str, Any] = json.loads(Path(__file__).with_name("paper_tables.json").read_text("utf-8"))
# What the authors' code does: scales from the extreme weights, columns as they come, no refinement afterwards.
AUTHORS = afpq.GptqOptions(damp=0.01, order="none", sweeps=0, float_target=False)
FLOAT = "float"


@dataclass(frozen=True)
class Cell:
    """One model of a table: a row of the paper, a group size, and how it is made; `scheme` None is the original."""

    row: str
    group: int | None
    scheme: str | None
    method: str

    @property
    def name(self) -> str:
        """Its file's name; tables that share a model share the cell."""
        return FLOAT if self.scheme is None else f"{self.method}-{self.scheme}"


def scheme_of(row: str, group: int) -> str:
    """`NF3-sym`, 128 -> nf3-sym-g128; the paper's integers have a zero point."""
    format, _, side = row.lower().partition("-")
    return f"{format}-{side or 'asym'}-g{group}"


def cells_of(table: str, groups: list[int], rows: list[str] | None) -> list[Cell]:
    """The cells of a table, the original first."""
    content = PAPER["table 5"] if table == "5" else PAPER["tables"][table]
    unknown = set(rows or ()) - set(content["rows"])
    if unknown:
        raise afpq.AfpqError(f"row {min(unknown)!r}; table {table} has {', '.join(content['rows'])}")
    sizes = [content["group"]] if table == "5" else groups
    chosen = [row for row in content["rows"] if rows is None or row in rows]
    made = [Cell(row, g, scheme_of(row, g), content["method"]) for row in chosen for g in sizes]
    return [Cell("FP16", None, None, FLOAT), *made]


def paper_number(table: str, cell: Cell, model: str | None, measure: str) -> float | None:
    """The paper's figure for a cell; None where it has none for this model."""
    if table == "5":
        five = PAPER["table 5"]
        row = five["float"] if cell.scheme is None else five["rows"][cell.row]
        return row.get(model) if five["tasks"].get(model) == measure else None
    if cell.scheme is None:
        return PAPER["float"].get(model, {}).get(measure)
    numbers = PAPER["tables"][table]["rows"][cell.row].get(model, {}).get(measure)
    return None if numbers is None or cell.group not in PAPER["groups"] else numbers[PAPER["groups"].index(cell.group)]


def paper_model(name: str) -> str | None:
    """The paper's name of a model, guessed from its directory or id."""
    plain = re.sub(r"[^a-z0-9]", "", Path(name).name.lower())
    known = {"llama27b": "LLaMA2-7B", "llama213b": "LLaMA2-13B", "llama270b": "LLaMA2-70B"}
    known |= {"wizardcoderpython7b": "WizardCoder-7B", "metamath7b": "MetaMath-7B"}
    return next((model for key, model in known.items() if plain.startswith(key) and "chat" not in plain), None)


class Laboratory:
    """Makes and measures cells of one model, on one text, with one set of settings."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.directory = arguments, Path(arguments.out)
        self.original: Any = None
        self.windows: Any = None
        calibrated = arguments.table in ("3", "4", "5")
        self.calibration = self._text(arguments.calibration_text, calibration=True) if calibrated else None
        self.text = None if arguments.table == "5" else self._text(arguments.text, calibration=False)
        keys = ("model", "seq_len", "max_tokens", "settings", "limit")
        self.settings = {key: str(getattr(arguments, key)) for key in keys}
        self.settings["text"] = hashlib.sha256((self.text or "").encode()).hexdigest()

    @staticmethod
    def _text(file: Path | None, calibration: bool) -> str:
        return read_text(file, None if file else "wikitext2", calibration)

    def result(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures, from its file where they are complete; what is missing is measured and added."""
        file = self.directory / "cells" / f"{cell.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = dict(self.settings)
        if cell.method in ("gptq", "awq"):
            settings["samples"] = str(self.arguments.samples)
            settings["calibration"] = hashlib.sha256((self.calibration or "").encode()).hexdigest()
        known = json.loads(file.read_text()) if file.exists() else {"settings": settings}
        if known["settings"] != settings:
            raise afpq.AfpqError(f"{file}: measured with other settings; give another --out, or delete it")
        tasks = self._tasks()
        missing = [task for task in tasks if task not in known]
        if missing or (self.text is not None and "perplexity" not in known):
            known |= self._measure(cell, missing, "perplexity" not in known)
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(known, indent=1) + "\n")
            unfinished.replace(file)
        return known

    def _tasks(self) -> list[str]:
        if self.arguments.table == "5":
            return [self.arguments.task]
        return ["mmlu"] if self.arguments.mmlu else []

    def _measure(self, cell: Cell, tasks: list[str], perplexity: bool) -> dict[str, Any]:
        place, found = self.directory / "models" / cell.name, {}
        if cell.scheme is None:
            model = str(self.arguments.model)
        else:
            model = str(place)
            found["bits"] = self._quantize(cell, place)
        if perplexity and self.text is not None:
            found |= self._perplexity(model)
        for task in tasks:
            found[task] = run_task(model, task, self.directory, self.arguments.limit)
        shutil.rmtree(place, ignore_errors=True)
        return found

    def _quantize(self, cell: Cell, place: Path) -> float:
        """True bits a weight; a model left complete by a stopped run is used as it is."""
        if place.exists():
            return json.loads(place.with_suffix(".json").read_text())["bits"]  # type: ignore[no-any-return]
        assert cell.scheme is not None
        options: dict[str, Any] = {}
        if self.arguments.settings == "authors":
            options = {"scale_search": "mse" if cell.method == "awq" else "absmax"}  # AWQ searches its clipping
            options |= {"options": AUTHORS} if cell.method == "gptq" else {}
        place.parent.mkdir(parents=True, exist_ok=True)
        plan = afpq.quantize(
            self.arguments.model, place, cell.scheme, method=cell.method, evaluate=False,
            text=self.calibration if cell.method != "rtn" else None,
            settings=afpq.CalibrationSettings(self.arguments.samples, self.arguments.seq_len), **options,
        ).plan  # fmt: skip
        place.with_suffix(".json").write_text(json.dumps({"bits": plan.bits_per_weight}))
        return plan.bits_per_weight

    def _perplexity(self, model: str) -> dict[str, Any]:
        loaded = load_model(model)
        if self.windows is None:
            length = window_length(loaded, self.arguments.seq_len)
            stream = tokenize(load_tokenizer(self.arguments.model), str(self.text))
            self.windows = windows(stream, length, self.arguments.max_tokens)
        reference = None
        if self.arguments.kl:
            self.original = self.original or load_model(self.arguments.model)
            reference = logits_of(self.original, self.windows)
        return evaluate(loaded, self.windows, reference).to_json()


def run_task(model: str, task: str, scratch: Path, limit: int | None) -> float:
    """A benchmark's score in percent, by `afpq eval --tasks`."""
    file = scratch / "task.json"
    command = [sys.executable, "-m", "afpq", "eval", model, "--tasks", task, "--json", str(file)]
    command += ["--num-fewshot", "5"] if task == "mmlu" else []
    command += ["--allow-code-execution"] if task == "humaneval" else []
    command += ["--limit", str(limit)] if limit else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("afpq: ")
        raise afpq.AfpqError(f"{task} could not be measured (benchmarks need pip install 'afpq[eval]'): {reason}")
    metrics = json.loads(file.read_text())["tasks"][task]["metrics"]
    file.unlink()
    wanted = ("acc,", "exact_match,strict", "exact_match,", "pass@1,", "pass_at_1,")
    for start in wanted:
        for key, value in metrics.items():
            if key.startswith(start):
                return 100 * float(value)
    raise afpq.AfpqError(f"{task}: none of its figures is an accuracy: {', '.join(metrics)}")


def report(table: str, model: str | None, measures: list[str], results: list[tuple[Cell, dict[str, Any]]]) -> str:
    """A Markdown table: a line for each cell."""
    header = ["row", "group", "true bits"]
    for measure in measures:
        header += [measure, "paper"]
        header += ["±", "KL x 1000"] if measure == "perplexity" else []
    lines = []
    for cell, found in results:
        line = [cell.row, {None: "", -1: "row"}.get(cell.group, str(cell.group)), _text(found.get("bits"), 3)]
        for measure in measures:
            line += [_text(found.get(measure), 2), _text(paper_number(table, cell, model, measure), 2)]
            if measure == "perplexity":
                kl = found.get("kl_divergence")
                line += [_text(found.get("standard_error"), 2), _text(None if kl is None else 1000 * kl, 2)]
        lines.append(line)
    return markdown(header, lines, text_columns=1) + "\n"


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def latency() -> str:
    """Table 6 is about one GPU and another engine: the paper's numbers, and what measures ours."""
    six = PAPER["table 6"]
    lines = [f"Table 6, {six['title']}; speed-up over FP16 in brackets:"]
    for model, row in six["rows"].items():
        cells = [f"{name} {ms:.2f} ({row['FP16'] / ms:.2f} x)" for name, ms in row.items()]
        lines.append(f"  {model}: {', '.join(cells)}")
    lines.append("Ours, as ratios from one run: python bench/linear.py (a layer), bench/decode.py (a model), on a CPU;")
    return "\n".join([*lines, "python bench/gpu.py on a GPU."])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=list("12345678"))
    parser.add_argument("--model", help="a directory or hub id")
    parser.add_argument("--out", type=Path, help="where results go; one directory for each model and setting")
    parser.add_argument("--text", type=Path, help="instead of WikiText-2's test split")
    parser.add_argument("--calibration-text", type=Path, help="instead of WikiText-2's training split")
    parser.add_argument("--groups", default="-1,256,128,64", help="group sizes, -1 for a row (--groups=-1,64)")
    parser.add_argument("--rows", help="only these rows, as NF3-sym,NF3-asym")
    parser.add_argument("--settings", choices=("authors", "afpq"), default="authors", help="of the methods")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, help="measure on the first so many tokens only")
    parser.add_argument("--kl", action="store_true", help="also KL from the original, which is loaded beside")
    parser.add_argument("--mmlu", action="store_true", help="also MMLU, 5-shot: hours on a GPU")
    parser.add_argument("--limit", type=int, help="only the first so many documents of a benchmark")
    parser.add_argument("--paper-model", choices=[*PAPER["float"], *PAPER["table 5"]["tasks"]])
    chosen = parser.parse_args(arguments)
    if chosen.table != "6" and (chosen.model is None or chosen.out is None):
        parser.error("--model and --out are needed")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.table == "6":
        print(latency())
        return 0
    model = chosen.paper_model or paper_model(chosen.model)
    try:
        if chosen.table == "5" and model not in PAPER["table 5"]["tasks"]:
            raise afpq.AfpqError("table 5 is about WizardCoder-7B and MetaMath-7B: say which one with --paper-model")
        chosen.task = PAPER["table 5"]["tasks"].get(model)
        groups = [int(group) for group in chosen.groups.split(",")]
        cells = cells_of(chosen.table, groups, chosen.rows.split(",") if chosen.rows else None)
        measures = [chosen.task] if chosen.table == "5" else ["perplexity", *(["mmlu"] if chosen.mmlu else [])]
        results = []
        with quiet_transformers():
            laboratory = Laboratory(chosen)
            for cell in cells:
                results.append((cell, laboratory.result(cell)))
                print(report(chosen.table, model, measures, results[-1:]).splitlines()[-1], flush=True)
    except (afpq.AfpqError, ValueError) as error:
        print(f"reproduce_paper: {error}", file=sys.stderr)
        return 2
    title = PAPER["table 5"]["title"] if chosen.table == "5" else PAPER["tables"][chosen.table]["title"]
    text = f"# Table {chosen.table}: {title}\n\n{report(chosen.table, model, measures, results)}"
    (chosen.out / f"table-{chosen.table}.md").write_text(text, "utf-8")
    print(f"\n{text}")
    if model is None:
        print(f"The paper has no numbers for {chosen.model}; --paper-model names the model of the paper it is.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
