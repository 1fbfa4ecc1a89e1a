# SPDX-License-Identifier: MIT
"""Modules that the documentation named before the rooms: their old names work until version 0.3, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Old module -> where its definitions are now; both without "afpq.".
MOVED: dict[str, tuple[str, ...]] = {
    "blocks": ("model.blocks",),
    "convert": ("model.quantize_in_memory",),
    "data": ("evaluation.text",),
    "devices": ("evaluation.devices",),
    "embedding": ("model.embedding",),
    "evaluate": ("evaluation.perplexity",),
    "folds": ("model.awq_folds", "model.apply_folds"),
    "formats": ("numerics.formats",),
    "groups": ("numerics.groups",),
    "integrations.lm_eval": ("evaluation.benchmarks",),
    "job": ("jobs.prepare",),
    "kernels.packed": ("kernels.operands",),
    "linear": ("model.linear",),
    "loading": ("evaluation.loading",),
    "packing": ("numerics.packing",),
    "scales": ("numerics.scales", "numerics.scale_storage"),
    "scheme": ("numerics.scheme", "algorithms.solver_options", "recipe"),
    "skeleton": ("model.skeleton",),
    "source": ("checkpoint.reader", "model.tensor_part"),
}


class _OldName(Loader):
    """Fills a module of an old name with the public definitions of the new ones."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None  # an ordinary empty module

    def exec_module(self, module: ModuleType) -> None:
        new = " and ".join(f"afpq.{place}" for place in self.places)
        # Level 2 is the import system itself, whose frames Python leaves out of the count.
        warnings.warn(f"{module.__name__} is now {new}; the old name ends with afpq 0.3", DeprecationWarning, 2)
        for place in self.places:
            definitions = vars(import_module(f"afpq.{place}"))
            vars(module).update({name: value for name, value in definitions.items() if not name.startswith("__")})


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        places = MOVED.get(fullname.removeprefix("afpq.")) if fullname.startswith("afpq.") else None
        return None if places is None else ModuleSpec(fullname, _OldName(places))


def keep_old_names() -> None:
    """From now on the old names can be imported; call once."""
    sys.meta_path.append(_Finder())  # last: never asked for a module that is there
