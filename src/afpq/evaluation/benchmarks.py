# SPDX-License-Identifier: MIT
"""Benchmarks by EleutherAI's lm-evaluation-harness: GSM8K, MMLU, HellaSwag, or tasks of your own in YAML.

The harness makes the prompts and the scores; this file gives it a model, quantized or not, and turns its failures into
one clear line. It needs `pip install 'afpq[eval]'`, and most tasks the network for their data.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from afpq.errors import AfpqError, one_line
from afpq.evaluation.loading import generates, load_model, load_tokenizer

T = TypeVar("T")

CODE_SWITCH = "HF_ALLOW_CODE_EVAL"  # the variable that Hugging Face's code_eval metric requires
CODE_REFUSED = "it runs Python code that the model writes, here and unguarded; allow it with --allow-code-execution"


@dataclass(frozen=True)
class TaskOptions:
    """Options of a run.

    `include_path` holds tasks of your own; `limit` keeps only the first documents of each task; `num_fewshot` replaces
    the tasks' own number of examples in a prompt. Raises AfpqError for invalid numbers.
    """

    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    allow_code_execution: bool = False

    def __post_init__(self) -> None:
        if self.include_path is not None and not self.include_path.is_dir():
            raise AfpqError(f"{self.include_path}: no such directory of tasks")
        for name, value, least in (
            ("batch size", self.batch_size, 1), ("limit", self.limit, 1), ("num fewshot", self.num_fewshot, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise AfpqError(f"{name} {value}: at least {least} is needed")


@dataclass(frozen=True)
class TaskResult:
    """The result of a task or group.

    `metrics` has the harness' own keys: `acc,none`, `acc_stderr,none`, `exact_match,flexible`. `documents` were
    scored. It and the others are None if the harness has none, as for groups.
    """

    metrics: dict[str, float]
    num_fewshot: int | None
    documents: int | None
    version: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class TaskRun:
    """Tasks by name, found and loaded; `run` scores a model on them.

    Raises AfpqError, before a model is needed, if the harness is not installed, lacks a task or cannot load it, and for
    a task that executes code without permission.
    """

    def __init__(self, names: Sequence[str], options: TaskOptions | None = None, progress: bool = False) -> None:
        self.options = options or TaskOptions()
        self.progress = progress
        with self._surroundings():
            self.manager = _find_tasks(names, self.options)
            self.objects = [task for name in names for task in _load(self.manager, name, self.options)]

    def run(self, model: Any, tokenizer: Any) -> dict[str, TaskResult]:
        """Score a loaded model, on its own device, and return the results by task and group.

        Raises AfpqError if the harness stops, and for a model that does not generate text, such as an encoder.
        """
        if not generates(model):
            raise AfpqError(f"{type(model).__name__} does not write text; the tasks need a model that does")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        tokenizer = _padded(tokenizer)
        with self._surroundings():
            results = _guarded(
                "the tasks",
                lambda: simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.options.batch_size),
                    tasks=self.objects,
                    task_manager=self.manager,  # otherwise it would read its index again
                    num_fewshot=self.options.num_fewshot,
                    limit=self.options.limit,
                    log_samples=False,
                    confirm_run_unsafe_code=self.options.allow_code_execution,
                ),
            )
        return {name: _result(results, name) for name in results["results"]}

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Inside, the harness prints nothing, and may execute code only if that was allowed."""
        logger, before = logging.getLogger("lm_eval"), os.environ.get(CODE_SWITCH)
        level = logger.level
        logger.setLevel(logging.ERROR)
        if self.options.allow_code_execution:
            os.environ[CODE_SWITCH] = "1"
        try:
            with contextlib.nullcontext() if self.progress else contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            logger.setLevel(level)
            if self.options.allow_code_execution:
                os.environ.pop(CODE_SWITCH)
                os.environ.update({} if before is None else {CODE_SWITCH: before})


def run_tasks(
    model: Any, names: Sequence[str], options: TaskOptions | None = None, *, tokenizer: Any = None, device: str = "auto"
) -> dict[str, TaskResult]:
    """Score a model, given as a directory, a hub id, or an object with its tokenizer, on tasks of the harness.

    Raises AfpqError as `TaskRun` does, and for a model that cannot be loaded.
    """
    run = TaskRun(names, options)
    if isinstance(model, str | Path):
        return run.run(load_model(model, device=device), tokenizer or load_tokenizer(model))
    if tokenizer is None:
        raise AfpqError("a model given as an object needs its tokenizer too")
    return run.run(model, tokenizer)


def _find_tasks(names: Sequence[str], options: TaskOptions) -> Any:
    """Make the harness' TaskManager with all `names`. Its own index takes ten seconds: read only if needed."""
    try:
        from lm_eval.models import huggingface as _needs_more_packages  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AfpqError(
            f"--tasks needs lm-evaluation-harness: pip install 'afpq[eval]' ({str(error).splitlines()[0]})"
        ) from None
    own = None if options.include_path is None else str(options.include_path)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):  # groups may name the harness' own tasks
            return manager
    manager = _harness_tasks() if own is None else TaskManager(include_path=own)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            place = f" nor in {own}" if own else ""
            raise AfpqError(f"task {name!r} is not known to lm-eval{place}{hint} (lm-eval ls tasks lists all)")
    return manager


@functools.cache
def _harness_tasks() -> Any:
    """Read the harness' own tasks, once in a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str, options: TaskOptions) -> list[Any]:
    """Load the task, the group, or the tasks of a tag called `name`, with their documents."""
    entry = manager.task_index.get(name)
    if (getattr(entry, "cfg", None) or {}).get("unsafe_code") and not options.allow_code_execution:
        raise AfpqError(f"task {name}: {CODE_REFUSED}")  # before loading, which already runs some code
    try:
        loaded = _guarded(f"task {name}", lambda: manager.load([name]))
    except AfpqError as error:
        if CODE_SWITCH in str(error.__cause__) and not options.allow_code_execution:
            raise AfpqError(f"task {name}: {CODE_REFUSED}") from None
        raise
    unsafe = next((key for key, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)), None)
    if unsafe is not None and not options.allow_code_execution:
        raise AfpqError(f"task {unsafe}: {CODE_REFUSED}")
    groups = loaded.get("groups") or {}
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _guarded(what: str, work: Callable[[], T]) -> T:
    """Raise AfpqError for any error of the harness or of datasets, with that error as its cause."""
    try:
        return work()
    except AfpqError:
        raise
    except Exception as error:
        reason = one_line(error, 300) or "no reason given"
        raise AfpqError(f"{what}: lm-eval stopped: {type(error).__name__}: {reason}") from error


def _padded(tokenizer: Any) -> Any:
    """Copy the tokenizer with a padding token: the harness would add one beyond the model's vocabulary.

    Padding is masked. Raises AfpqError if no special token begins or ends a text: the harness needs one for an empty
    prompt.
    """
    if tokenizer.bos_token is None and tokenizer.eos_token is None:
        raise AfpqError("the tokenizer has no token that begins or ends a text; lm-eval needs one of them")
    tokenizer = copy.deepcopy(tokenizer)
    if not any((tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token)):
        tokenizer.pad_token = tokenizer.bos_token
    return tokenizer


def _result(results: Mapping[str, Any], name: str) -> TaskResult:
    metrics = {
        key: float(value)
        for key, value in results["results"][name].items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    count = (results.get("n-samples") or {}).get(name) or {}
    version = (results.get("versions") or {}).get(name)
    shots = (results.get("n-shot") or {}).get(name)
    return TaskResult(metrics, shots, count.get("effective"), None if version is None else str(version))
