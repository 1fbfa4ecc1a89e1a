# SPDX-License-Identifier: MIT
"""What a user should see before the work begins: one line for each thing about the checkpoint that may surprise."""

from __future__ import annotations

import re

from afpq.checkpoint.plan import Plan
from afpq.checkpoint.wrappers import wrapper_note
from afpq.errors import counted
from afpq.jobs.prepare import Job
from afpq.model.coverage import kinds_left

MAX_KINDS_NAMED = 6


def unused_kinds(plan: Plan) -> list[str]:
    """Return the unused tensors by kind, the largest first; those of a kind that is used too by their block."""
    infos, unused = plan.checkpoint.tensors, set(plan.unused)
    used = kinds_left({name: 1 for name in infos if name not in unused})
    sizes: dict[str, int] = {}
    for name in plan.unused:
        kind = next(iter(kinds_left({name: 1})))
        block = re.match(r".*?\.\d+(?=\.)", name)
        place = f"{block[0]}.*" if kind in used and block is not None else kind
        sizes[place] = sizes.get(place, 0) + infos[name].elements
    return sorted(sizes, key=lambda place: -sizes[place])


def notices(job: Job) -> list[str]:
    """Return the lines, none for a usual checkpoint."""
    plan = job.plan
    lines = [wrapper_note(plan.wrapper)] if plan.wrapper else []
    if plan.unused:
        kinds = unused_kinds(plan)
        more = f" and {len(kinds) - MAX_KINDS_NAMED} more" if len(kinds) > MAX_KINDS_NAMED else ""
        one = len(plan.unused) == 1
        lines.append(
            f"{counted(len(plan.unused), 'tensor')} of the file {'is' if one else 'are'} not part of "
            f"{type(job.model).__name__} and {'is' if one else 'are'} copied as {'it is' if one else 'they are'}: "
            f"{', '.join(kinds[:MAX_KINDS_NAMED])}{more}"
        )
    return lines
