# SPDX-License-Identifier: MIT
"""`afpq compare`: schemes and methods side by side on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afpq.algorithms.methods import METHODS
from afpq.commands.options import DatasetOption, ModelArgument, TextOption, ThreadsOption, TrustOption, command
from afpq.commands.output import console, progress_bar, quiet_transformers, results, use_threads, warn


@command()
def compare(
    model: ModelArgument,
    schemes: Annotated[str, typer.Option(help="Separated by commas, as nf4-asym-g128,nf4-sym-g64,int4-asym-g128.")],
    report: Annotated[Path, typer.Option(help="The directory for report.html, .md and .json and finished cells.")],
    methods: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(METHODS)}.")] = "rtn",
    text: TextOption = None,
    dataset: DatasetOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="What methods other than rtn learn from; else --dataset's training part.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window; cut to the model's context.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Measure on the first so many tokens only.")] = None,
    seed: Annotated[int, typer.Option(help="Which windows of calibration text are drawn.")] = 0,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also measure bitsandbytes, HQQ and torchao, where installed.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized models in REPORT/models.")] = False,
    device: Annotated[str, typer.Option(help="Where to calibrate: auto, cpu, cuda, cuda:1, ...")] = "auto",
    threads: ThreadsOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Quantize one model in several ways, measure all of them alike, and write a report with charts.

    Finished cells are kept in the report's directory: the same command goes on, and other schemes or methods add to it.
    """
    from afpq.comparison.findings import sentences
    from afpq.comparison.report import write_comparison
    from afpq.comparison.run import Comparison, asymmetries, describe_setting
    from afpq.comparison.tasks import Question, make_agenda
    from afpq.evaluation.text import read_text
    from afpq.jobs.prepare import CalibrationSettings

    use_threads(threads)
    calibration = _calibration_text(methods, calibration_text, dataset)
    question = Question(
        model, schemes.split(","), methods.split(","), read_text(text, dataset), calibration,
        CalibrationSettings(samples, seq_len, seed, device), seq_len, max_tokens,
        text.name if text else f"{dataset}, test part",
        calibration_text.name if calibration_text else f"{dataset}, training part", peers, keep, trust_remote_code,
    )  # fmt: skip
    if calibration is not None and calibration == question.text:
        warn("calibrated on the very text that is measured: too good to be true")
    with quiet_transformers(), progress_bar("start") as advance:
        agenda = make_agenda(question)
        comparison = Comparison(question, agenda, report)
        cells = comparison.run(advance, console.print)
        groups = asymmetries(agenda, cells)
    about = describe_setting(comparison, cells)
    for sentence in sentences(cells):
        console.print(f"- {sentence}")
    for path in write_comparison(report, about, cells, groups):
        results.print(f"wrote {path}")


def _calibration_text(methods: str, file: Path | None, dataset: str | None) -> str | None:
    """Read the calibration text, if a method needs one."""
    from afpq.evaluation.text import read_text

    wanted = any(method.strip() in METHODS and METHODS[method.strip()].calibrated for method in methods.split(","))
    if not wanted or (file is None and dataset is None):
        return None
    return read_text(file, None if file is not None else dataset, calibration=True)
