# SPDX-License-Identifier: MIT
"""Carry out a job: quantize and write the weights unit by unit, then finish the directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from afpq.algorithms.methods import METHODS
from afpq.calibration.calibrated_run import CalibrationRun, run_calibrated
from afpq.calibration.round_units import UnitResult, run
from afpq.checkpoint.verify import digest
from afpq.checkpoint.work_directory import WorkDirectory, work_directory
from afpq.checkpoint.writer import ShardWriter
from afpq.jobs.disk_room import bytes_on_disk
from afpq.jobs.finish_directory import Outcome, check_memory, finish_directory
from afpq.jobs.finite_values import check_kept
from afpq.jobs.prepare import Job
from afpq.progress import Progress


def execute(job: Job, out: Path, *, resume: bool = True, progress: Progress | None = None) -> Outcome:
    """Carry out a job into the new directory `out`, going on from OUT.partial if the same job was stopped there.

    The result gets its name once it has passed the self-test and has its card. Raises AfpqError if it does not pass.
    """
    check_kept(job.plan, job.model)
    with work_directory(out, bytes_on_disk(job), job.fingerprint(), resume) as work:
        check_memory(job, work)
        _write_weights(job, work, progress)
        return finish_directory(job, work, progress)


def _write_weights(job: Job, work: WorkDirectory, progress: Progress | None) -> None:
    plan, infos = job.plan, job.plan.checkpoint.tensors
    sizes = {unit.name: sum(infos[name].elements for name in unit.tensors) for unit in plan.units}
    written = [name for unit in plan.units if unit.name in work.finished for name in plan.unit_outputs(unit)]
    with ShardWriter(work.path, plan.outputs(), written=written) as writer:
        for result in _results(job, work.scratch, frozenset(work.finished), progress):
            digests = {}
            for name, tensor in result.tensors:
                writer.write(name, tensor)
                digests[name] = digest(tensor)
            writer.sync()
            work.finish(result.unit.name, [log.to_json() for log in result.logs], digests, result.schemes)
            if progress is not None:
                done = sum(sizes[name] for name in work.finished)
                progress(_describe(result), done, sum(sizes.values()))


def _results(job: Job, scratch: Path, finished: frozenset[str], progress: Progress | None) -> Iterator[UnitResult]:
    if job.windows is None or not METHODS[job.plan.recipe.method].calibrated:
        return run(job.plan, finished)
    settings = job.settings
    device, report = settings.torch_device(), progress or (lambda *_: None)
    calibration = CalibrationRun(job.windows, scratch, device, settings.all_experts, settings.seed, report)
    return run_calibrated(job.plan, job.model, calibration, finished)


def _describe(result: UnitResult) -> str:
    """The unit, and the mean relative error of its layers."""
    errors = [log.weight_error if log.output_error is None else log.output_error for log in result.logs]
    return f"{result.unit.name} error {sum(errors) / len(errors):.2e}" if errors else result.unit.name
