# SPDX-License-Identifier: MIT
"""`afpq.quantize`: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from afpq.checkpoint import ShardWriter, atomic_directory, write_json
from afpq.config import config_to_json
from afpq.pipeline import LayerLog, run
from afpq.plan import Plan, make_plan
from afpq.scheme import Recipe, Scheme, parse_scheme
from afpq.skeleton import build_skeleton
from afpq.source import open_checkpoint

LOG_NAME = "afpq_log.jsonl"

Progress = Callable[[str, int, int], None]  # (unit, weights done, weights in all)


def plan_quantization(model: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """What `recipe` would do to the checkpoint `model` (a directory or hub id), from headers alone."""
    checkpoint = open_checkpoint(model)
    return make_plan(checkpoint, build_skeleton(checkpoint.directory, trust_remote_code), recipe)


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str | Scheme = "nf4-asym-g128",
    *,
    method: str = "rtn",
    scale_search: str = "absmax",
    skip: tuple[str, ...] = (),
    overrides: tuple[tuple[str, Scheme], ...] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Quantize a checkpoint (a directory or a hub id) into the new directory `out`; returns the plan carried out.

    `out` appears only when complete. `skip` and the patterns of `overrides` are regular expressions searched in
    module names. Raises AfpqError for bad input, and leaves nothing behind then.
    """
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    recipe = Recipe(scheme, method, scale_search, tuple(skip), tuple(overrides))
    plan = plan_quantization(model, recipe, trust_remote_code)
    execute(plan, Path(out), progress)
    return plan


def execute(plan: Plan, out: Path, progress: Progress | None = None) -> None:
    """Carry out a plan into the new directory `out`."""
    outputs = plan.outputs()
    with atomic_directory(out, plan.output_bytes) as partial:
        with ShardWriter(partial, outputs) as writer, open(partial / LOG_NAME, "w", encoding="utf-8") as log:
            done, total = 0, sum(info.elements for info in plan.checkpoint.tensors.values())
            for result in run(plan):
                for name, tensor in result.tensors:
                    writer.write(name, tensor)
                _write_log(log.write, result.logs)
                done += sum(plan.checkpoint.tensors[name].elements for name in result.unit.tensors)
                if progress is not None:
                    progress(result.unit.name, done, total)
        for path in plan.checkpoint.companions():
            shutil.copyfile(path, partial / path.name)
        config = {**plan.checkpoint.config, "quantization_config": config_to_json(plan.recipe, plan.kept)}
        write_json(partial / "config.json", config)


def _write_log(write: Callable[[str], object], logs: list[LayerLog]) -> None:
    for log in logs:
        write(json.dumps(log.to_json()) + "\n")
