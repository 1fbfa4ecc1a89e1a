# SPDX-License-Identifier: MIT
"""Write a checkpoint made from another, a tensor at a time; OUT appears once everything is written and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from afpq.checkpoint.atomic_files import write_json
from afpq.checkpoint.checksums import write_checksums
from afpq.checkpoint.companions import companion_bytes, copy_companions
from afpq.checkpoint.reader import CARD, Checkpoint, open_checkpoint
from afpq.checkpoint.verify import check_tensors, digest
from afpq.checkpoint.work_directory import work_directory
from afpq.checkpoint.writer import ShardWriter
from afpq.numerics.packing import Spec, spec_bytes
from afpq.progress import Progress


@dataclass(frozen=True)
class Rewrite:
    """The contents of OUT: the companions of `source`, tensors in order, config.json and model card."""

    source: Checkpoint
    outputs: dict[str, Spec]
    config: dict[str, Any]
    card: str

    @property
    def output_bytes(self) -> int:
        return sum(map(spec_bytes, self.outputs.values()))


def rewrite(
    job: Rewrite,
    out: Path,
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress | None = None,
    check: Callable[[Checkpoint, Mapping[str, str]], str] | None = None,
) -> str:
    """Write `tensors`, each of `job.outputs` once, into the new directory `out`; return the result of `check`.

    `check` gets the finished checkpoint, before it has its name, and its tensors' digests. A run that is stopped
    leaves nothing. Raises AfpqError if `out` exists or cannot be written, and for a tensor that differs on the disk
    from the computed one.
    """
    digests: dict[str, str] = {}
    done = 0
    # Its journal has no finished units, but `resume` keeps the OUT.partial of another run that can be resumed.
    needed = job.output_bytes + companion_bytes(job.source)
    with work_directory(out, needed, {"command": "a conversion"}, resume=True) as work:
        with ShardWriter(work.path, job.outputs) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
                digests[name] = digest(tensor)
                done += tensor.nbytes
                if progress is not None:
                    progress(name, done, job.output_bytes)
        copy_companions(job.source, work.path)
        (work.path / CARD).write_text(job.card, "utf-8")
        with work.as_published(job.config) as directory:
            written = open_checkpoint(directory)
            check_tensors(written, job.outputs, digests)
            write_checksums(work.path, job.outputs, digests, job.config)
            verdict = "" if check is None else check(written, digests)
        write_json(work.path / "config.json", job.config)
    return verdict
