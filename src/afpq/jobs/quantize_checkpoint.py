# SPDX-License-Identifier: MIT
"""`afpq.quantize`: a checkpoint in, a quantized checkpoint out; the command line takes the same path."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from afpq.algorithms.methods import NEAREST
from afpq.algorithms.solver_options import GptqOptions, SolverOptions
from afpq.checkpoint.work_directory import refuse_existing
from afpq.jobs.bit_budget import Budget, make_budget
from afpq.jobs.execute import execute
from afpq.jobs.finish_directory import Outcome
from afpq.jobs.notices import notices
from afpq.jobs.prepare import BudgetSearch, CalibrationSettings, Job, Texts, prepare, sensitivities_file
from afpq.numerics.scheme import DEFAULT_SCHEME, Scheme, parse_scheme
from afpq.progress import Progress
from afpq.recipe import Recipe, options_from, scheme_of_end, warn_of_gptq


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that one run of `quantize` depends on, parsed; `sensitivities`: the file that the user gave, if any."""

    model: str | Path
    out: Path
    recipe: Recipe
    texts: Texts
    settings: CalibrationSettings | None = None
    budget: Budget | None = None
    sensitivities: Path | None = None
    resume: bool = True
    trust_remote_code: bool = False


def _log(line: str) -> None:
    logging.getLogger("afpq").warning("%s", line)


def run_request(
    request: Request,
    progress: Progress | None = None,
    dry_run: bool = False,
    note: Callable[[str], object] = _log,
) -> tuple[Job, Outcome | None]:
    """Prepare the job and, except in a dry run, carry it out. Raises AfpqError for bad input.

    `note` gets each line of `notices` before the work begins; by default they are logged as warnings.
    Sensitivities measured for a budget are kept next to `out` until the result, which contains them, is complete.
    """
    search = None
    if not dry_run:
        refuse_existing(request.out)
    if request.budget is not None:
        file = sensitivities_file(request.out, request.sensitivities, request.resume)
        search = BudgetSearch(request.budget, file)
    job = prepare(
        request.model,
        request.recipe,
        request.texts,
        settings=request.settings,
        trust_remote_code=request.trust_remote_code,
        search=search,
        progress=progress,
    )
    for line in notices(job):
        note(line)
    if dry_run:
        return job, None
    outcome = execute(job, request.out, resume=request.resume, progress=progress)
    if search is not None and search.file is not None and request.sensitivities is None:
        search.file.unlink(missing_ok=True)
    return job, outcome


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = DEFAULT_SCHEME,
    *,
    method: str = NEAREST,
    scale_search: str | None = None,
    options: SolverOptions | None = None,
    skip: Sequence[str] = (),
    overrides: Sequence[tuple[str, Scheme]] = (),
    lm_head: str | Scheme | bool | None = None,
    embedding: str | Scheme | bool | None = None,
    end_pass: int = 0,
    text: str | Sequence[str] | None = None,
    eval_text: str | Sequence[str] | None = None,
    evaluate: bool = True,
    settings: CalibrationSettings | None = None,
    bits_per_weight: float | None = None,
    candidates: Sequence[str | Scheme] | None = None,
    sensitivities: str | Path | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    measured: bool | None = None,
    gptq: GptqOptions | None = None,
) -> Outcome:
    """Quantize a checkpoint (a directory or a hub id) into the new directory `out`.

    `text` is the calibration text: a string or a list of them. The card's perplexity and KL are measured on
    `eval_text`, or else on parts of `text` that were not used; with `evaluate=False` they are not measured.
    `scale_search`, `options`, `skip`, `overrides` and `end_pass` are fields of Recipe. `lm_head` and `embedding` are
    schemes for the head and the embedding, True for the same as in the blocks. With `bits_per_weight` every group of
    layers gets the one of the `candidates` that keeps the predicted KL least under this budget, and `scheme` is for
    head and embedding alone; `sensitivities` is a file of the measurements for it, to be used again. `out` appears only
    when complete; a stopped run goes on if it is called again. `measured` and `gptq` are the names that `evaluate` and
    `options` had before. Raises AfpqError for bad input.
    """
    if measured is not None:
        warnings.warn("measured= is called evaluate= now; it goes with the next version", DeprecationWarning, 2)
        evaluate = measured
    if gptq is not None:
        warn_of_gptq()
        options = options_from(gptq, method)
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    head, table = scheme_of_end(lm_head, scheme), scheme_of_end(embedding, scheme)
    recipe = Recipe(
        scheme, method, scale_search=scale_search, skip=tuple(skip), overrides=tuple(overrides), options=options,
        lm_head=head, embedding=table, end_pass=end_pass,
    )  # fmt: skip
    file = None if sensitivities is None else Path(sensitivities)
    request = Request(
        model=model, out=Path(out), recipe=recipe, texts=Texts(text, eval_text, evaluate=evaluate), settings=settings,
        budget=make_budget(bits_per_weight, candidates), sensitivities=file, resume=resume,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    outcome = run_request(request, progress)[1]
    assert outcome is not None
    return outcome
