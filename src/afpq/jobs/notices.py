# SPDX-License-Identifier: MIT
"""What a user should see before the work begins: one line for each thing about the checkpoint that may surprise."""

from __future__ import annotations

from afpq.checkpoint.wrappers import wrapper_note
from afpq.errors import counted
from afpq.jobs.prepare import Job
from afpq.model.coverage import kinds_left

MAX_KINDS_NAMED = 6


def notices(job: Job) -> list[str]:
    """Return the lines, none for a usual checkpoint."""
    plan = job.plan
    lines = [wrapper_note(plan.wrapper)] if plan.wrapper else []
    if plan.unused:
        kinds = list(kinds_left({name: plan.checkpoint.tensors[name].elements for name in plan.unused}))
        more = f" and {len(kinds) - MAX_KINDS_NAMED} more" if len(kinds) > MAX_KINDS_NAMED else ""
        one = len(plan.unused) == 1
        lines.append(
            f"{counted(len(plan.unused), 'tensor')} of the file {'is' if one else 'are'} not part of "
            f"{type(job.model).__name__} and {'is' if one else 'are'} copied as {'it is' if one else 'they are'}: "
            f"{', '.join(kinds[:MAX_KINDS_NAMED])}{more}"
        )
    return lines
