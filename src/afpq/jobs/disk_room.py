# SPDX-License-Identifier: MIT
"""What a run puts on the disk: the result, the files next to it, and files that are gone at the end."""

from __future__ import annotations

from afpq.checkpoint.companions import companion_bytes
from afpq.checkpoint.plan import Plan
from afpq.jobs.end_pass import vector_places
from afpq.jobs.estimate import scratch_bytes
from afpq.jobs.prepare import Job
from afpq.numerics.packing import layout, spec_bytes


def bytes_on_disk(job: Job) -> int:
    """Return the bytes that must be free before a job begins: weights, companions, hidden states and the end pass."""
    windows = None if job.windows is None else (job.windows.shape[0], job.windows.shape[1])
    tuned = tuned_bytes(job.plan) if job.plan.recipe.end_pass else 0
    return job.plan.output_bytes + companion_bytes(job.plan.checkpoint) + scratch_bytes(job.plan, windows) + tuned


def tuned_bytes(plan: Plan) -> int:
    """Return the bytes of the end pass's file: all scales, and vectors such as norms and biases."""
    outputs = plan.outputs()
    parts = (spec for t in plan.targets for part, spec in layout(t.scheme, *t.shape).items() if part != "qweight")
    vectors = (outputs[name] for name in vector_places(plan).values() if len(outputs[name][1]) == 1)
    return sum(map(spec_bytes, parts)) + sum(map(spec_bytes, vectors))
