# SPDX-License-Identifier: MIT
"""What two scales would gain on a model, before any quantization: how lopsided its groups are, and the errors.

Each weight is rounded to nearest in four schemes: two scales a group, one scale, one scale at half the group (which
costs the same bits as two scales at the whole), and integers with zero points. Only some rows of each layer are read
and rounded, drawn with a seed: groups lie inside of rows, so rows are a fair sample of them. These are errors of
weights, not of outputs: they show which scheme suits the weights, not how good the model will be.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from afpq.algorithms import quantize_rtn
from afpq.checkpoint.make_plan import make_plan
from afpq.checkpoint.plan import Plan, Target
from afpq.checkpoint.reader import Checkpoint, open_checkpoint
from afpq.errors import AfpqError
from afpq.evaluation.inspection import Inspection, InspectSettings, LayerFigures
from afpq.model.skeleton import build_skeleton
from afpq.numerics.groups import extremes, relative_error
from afpq.numerics.packing import packed_bytes
from afpq.numerics.scheme import Scheme
from afpq.numerics.size import Size
from afpq.progress import Progress
from afpq.recipe import Recipe

SAMPLED_WEIGHTS = 2**17  # of a layer, if `rows` gives no number: enough for 1 % for groups of 128


def inspect_model(
    model: str | Path,
    settings: InspectSettings | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Inspect a checkpoint (a directory or hub id) that is not quantized yet; holds one layer's rows at a time.

    Raises AfpqError for bad input, and for NaN, Inf or weights too large for their scales in the rows it reads.
    """
    settings, start = settings or InspectSettings(), time.perf_counter()
    checkpoint = open_checkpoint(model)
    skeleton = build_skeleton(checkpoint.directory, trust_remote_code)
    plan = make_plan(checkpoint, skeleton, Recipe(settings.schemes[0], scale_search=settings.scale_search))
    plan.require_targets("an inspection")
    targets = _drawn(plan.targets, settings)
    blocks = {target.module: unit.name for unit in plan.units for target in unit.targets}
    layers = []
    with _one_thread():
        for index, target in enumerate(targets):
            kind = _kind(target.module.removeprefix(f"{blocks[target.module]}."))
            layers.append(_look_at(checkpoint, target, kind, settings, settings.seed + index))
            if progress is not None:
                progress(target.module, index + 1, len(targets))
    bits = {str(scheme): _true_bits(plan.targets, scheme) for scheme in settings.schemes}
    return Inspection(settings, layers, len(plan.targets), bits, round(time.perf_counter() - start, 3), _shares(plan))


def _shares(plan: Plan) -> dict[str, float]:
    infos = plan.checkpoint.tensors
    total = sum(info.elements for info in infos.values())
    modules = [plan.ends.embedding, None if plan.ends.tied else plan.ends.head]
    names = {module: plan.names.get(f"{module}.weight") for module in modules if module is not None}
    return {module: infos[found.tensor].elements / total for module, found in names.items() if found is not None}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: samples are small, and more threads wait for each other on a busy machine, ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _drawn(targets: list[Target], settings: InspectSettings) -> list[Target]:
    count = len(targets) if settings.layers is None else min(settings.layers, len(targets))
    return [targets[index] for index in _sample(len(targets), count, settings.seed)]


def _sample(total: int, count: int, seed: int) -> list[int]:
    """Draw `count` of the numbers below `total`, in order."""
    return sorted(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def _kind(name: str) -> str:
    """Map `mlp.experts.3.up_proj` to mlp.experts.*.up_proj."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _true_bits(targets: Sequence[Target], scheme: Scheme) -> float:
    return sum((Size(packed_bytes(scheme, *t.shape), t.elements) for t in targets), Size(0, 0)).bits


def _look_at(checkpoint: Checkpoint, target: Target, kind: str, settings: InspectSettings, seed: int) -> LayerFigures:
    count = settings.rows or -(-SAMPLED_WEIGHTS // target.shape[1])
    rows = _sample(target.shape[0], min(count, target.shape[0]), seed)
    weight = checkpoint.read_rows(target.source, rows).float()
    try:
        asymmetry, one_sided = lopsidedness(weight, settings.schemes[0])
        errors = {}
        for scheme in settings.schemes:
            errors[str(scheme)] = relative_error(weight, quantize_rtn(weight, scheme, settings.scale_search))
    except AfpqError as error:
        raise AfpqError(f"{target.tensor}: {error}") from None
    return LayerFigures(target.module, kind, target.shape, len(rows), asymmetry, one_sided, errors)


def lopsidedness(weight: Tensor, scheme: Scheme) -> tuple[float, float]:
    """Measure float32 [rows, in]: (median over two-sided groups of longer / shorter side, share of one-sided groups).

    Sides are measured in the codebook's reach on that side. Groups of zeros only count as neither; if no group has
    two sides the median is 1.
    """
    low, high = extremes(weight, scheme)
    book = scheme.format.values
    low, high = low / -book[0], high / book[-1]
    longer, shorter = torch.maximum(low, high), torch.minimum(low, high)
    both = longer[shorter > 0] / shorter[shorter > 0]
    filled = int((longer > 0).sum())
    one_sided = (filled - both.numel()) / filled if filled else 0.0
    return (float(both.median()) if both.numel() else 1.0), one_sided
