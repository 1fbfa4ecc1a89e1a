# SPDX-License-Identifier: MIT
"""`afpq.quantize`: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afpq.checkpoint.plan import Plan
from afpq.jobs.bit_budget import make_budget
from afpq.jobs.execute import execute
from afpq.jobs.prepare import CalibrationSettings, Progress, prepare, sensitivities_file
from afpq.numerics.scheme import DEFAULT_SCHEME, Scheme, parse_scheme
from afpq.recipe import Recipe, scheme_of_end


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = DEFAULT_SCHEME,
    *,
    method: str = "rtn",
    text: str | Sequence[str] | None = None,
    eval_text: str | Sequence[str] | None = None,
    measured: bool = True,
    settings: CalibrationSettings | None = None,
    resume: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    lm_head: str | Scheme | bool | None = None,
    embedding: str | Scheme | bool | None = None,
    bits_per_weight: float | None = None,
    candidates: Sequence[str | Scheme] | None = None,
    sensitivities: str | Path | None = None,
    **recipe: Any,
) -> Plan:
    """Quantize a checkpoint (a directory or a hub id) into the new directory `out`; returns the plan carried out.

    `text` is what calibrated methods learn from: a string or a list of them. The card's perplexity and KL are measured
    on `eval_text`, or else on parts of `text` that were not used; `measured=False` does without. `recipe` takes the
    other fields of Recipe, such as `scale_search`, `skip` and `overrides`; `lm_head` and `embedding` are schemes for
    the ends of the model, True for the same as in its blocks. With `bits_per_weight` every group of layers gets the one
    of the `candidates` that keeps the predicted KL least under this budget, and `scheme` is for the ends alone;
    `sensitivities` names a file of what was measured for it, to be used again. `out` appears only when complete; a run
    that was stopped goes on where it stopped when called again. Raises AfpqError for bad input.
    """
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    recipe |= {"lm_head": scheme_of_end(lm_head, scheme), "embedding": scheme_of_end(embedding, scheme)}
    budget = make_budget(bits_per_weight, candidates)
    given = None if sensitivities is None else Path(sensitivities)
    file = None if budget is None else sensitivities_file(Path(out), given, resume)
    job = prepare(
        model,
        Recipe(scheme, method, **recipe),
        text=text,
        eval_text=eval_text,
        measured=measured,
        settings=settings,
        trust_remote_code=trust_remote_code,
        budget=budget,
        sensitivities=file,
        progress=progress,
    )
    execute(job, Path(out), resume=resume, progress=progress)
    if file is not None and given is None:
        file.unlink(missing_ok=True)  # the result holds it
    return job.plan
